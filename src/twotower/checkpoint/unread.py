"""Matrices that stay in a checkpoint's files until they are packed, and what memory it takes."""

import math
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from torch import Tensor

from twotower.checkpoint.files import DTYPES, HALVES, PACKED_DTYPES, Entry
from twotower.checkpoint.fill import Plan, Tally, require_finite
from twotower.checkpoint.names import DENOISER_PARTS, keeps_dtype, split_part
from twotower.kernels.quantised import Bits, Quantised
from twotower.model.passes import Unreadable
from twotower.model.precision import EMBEDDINGS, Scheme, weight_bits

_BYTES: Mapping[Bits, float] = {8: 1.0, 4: 0.625}  # of a number, with its group's scales
_ANY = Scheme(weights="int8")
Parts = dict[str, Entry]
"""The tensor of a matrix, or those of one with few bits, by their names in the model."""


def packed_later(plan: Plan, packing: Scheme, is_tied: bool) -> dict[str, dict[int | None, Parts]]:
    """The matrices to which a scheme gives few bits, by name, those of a stack by expert. A tied
    head is there with the embeddings, whose weights it shares.
    """
    found = dict[str, dict[int | None, Parts]]()
    for entry, slot in plan.values():
        is_shared = is_tied and slot.weight.endswith("lm_head.weight")
        if not is_shared and weight_bits(slot.weight, slot.shape, packing):
            own = found.setdefault(slot.weight, {}).setdefault(slot.expert, {})
            own[slot.parameter] = entry
    return found


def half_dtypes(plan: Plan) -> dict[str, torch.dtype]:
    """The dtype of embeddings, and of matrices that could be packed, which the files have in half
    precision: native passes read them so. Of a stack in several there is none.
    """
    stored: dict[str, set[str]] = {}
    for entry, slot in plan.values():
        if slot.parameter.endswith(EMBEDDINGS) or weight_bits(slot.weight, slot.shape, _ANY):
            stored.setdefault(slot.parameter, set()).add(entry.dtype)
    return {
        name: DTYPES[only]
        for name, (only, *others) in stored.items()
        if only in HALVES and not others
    }


class UnreadExperts:
    """The matrices of a stack, each read when it is asked for, as `read_matrix` does."""

    def __init__(
        self, experts: Mapping[int | None, Parts], rounds_input: bool, tally: Tally
    ) -> None:
        self._experts, self._rounds_input, self._tally = experts, rounds_input, tally

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, expert: int) -> Tensor | Quantised:
        return _read_parts(self._experts[expert], self._rounds_input, self._tally)


def read_matrix(
    parts: Mapping[int | None, Parts], rounds_input: bool, tally: Tally
) -> Tensor | Quantised | UnreadExperts:
    """What `packed_later` found for a name. rounds_input: as in `Quantised`. Unreadable (one line)
    for values that are not finite, and for files that have changed since their headers were read.
    """
    if None in parts:
        return _read_parts(parts[None], rounds_input, tally)
    return UnreadExperts(parts, rounds_input, tally)


def _read_parts(entries: Parts, rounds_input: bool, tally: Tally) -> Tensor | Quantised:
    parts = dict[str, Tensor]()
    for name, entry in entries.items():
        try:
            found = entry.read()
            if tuple(found.shape) != entry.shape:
                raise ValueError(f"its shape was {list(entry.shape)}, and is {list(found.shape)}")
        except (OSError, SafetensorError, ValueError) as error:
            raise Unreadable(
                f"{entry.file}: {entry.name} cannot be read any more ({error}); restore the file, "
                "or load the model anew"
            ) from None
        found = found.float() if found.dtype == torch.float64 else found
        try:
            require_finite(found, entry)
        except ValueError as error:
            raise Unreadable(str(error)) from None
        parts[split_part(name)[1].removeprefix(".")] = found
        tally.add(entry)
    if "" in parts:
        return parts[""]
    return Quantised(parts["qdata"], parts["scale"], parts.get("zero"), rounds_input)


def bytes_of_towers(
    plan: Plan,
    dtypes: tuple[torch.dtype, torch.dtype],
    scheme: Scheme | None,
    is_tied: bool,
    own: Mapping[str, torch.dtype],
) -> tuple[int, int]:
    """What the context tower and the denoiser need of memory, each with its head: in their dtypes,
    but for those that have their own, and in few bits what a scheme gives few.
    """
    needed = [0.0, 0.0]
    for entry, slot in plan.values():
        if is_tied and slot.weight.endswith("lm_head.weight"):
            continue
        side = int(slot.parameter.startswith(DENOISER_PARTS))
        stored = {**DTYPES, **PACKED_DTYPES}[entry.dtype]
        kept = stored if keeps_dtype(slot.parameter) else own.get(slot.parameter, dtypes[side])
        size = float(kept.itemsize)
        if scheme is not None and slot.weight == slot.parameter:
            bits = weight_bits(slot.weight, slot.shape, scheme)
            size = size if bits is None else _BYTES[bits]
        needed[side] += math.prod(entry.shape) * size
    return round(needed[0]), round(needed[1])
