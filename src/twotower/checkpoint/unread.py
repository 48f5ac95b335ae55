"""Matrices that stay in a checkpoint's files until they are packed, and what memory it takes."""

import math
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from torch import Tensor

from twotower.checkpoint.files import DTYPES, HALVES, PACKED_DTYPES, Entry
from twotower.checkpoint.fill import Plan, Tally, require_finite
from twotower.checkpoint.names import DENOISER_PARTS, Slot, keeps_dtype, split_part
from twotower.kernels.quantised import Bits, Blocks, Quantised, bytes_a_number, scales_of
from twotower.model.passes import Unreadable
from twotower.model.precision import EMBEDDINGS, Scheme, packed_bits, stored_bits, weight_bits

_BYTES: Mapping[Bits, float] = {8: 1.0, 4: 0.625}  # of a number, with its group's scales
_ANY = Scheme(weights="int8")
Parts = dict[str, Entry]
"""The tensor of a matrix, or those of one with few bits, by their names in the model."""


class FileMatrix:
    """`UnreadMatrix` of the files that a checkpoint's headers name."""

    def __init__(self, bits: Bits | None, rounds_input: bool, tally: Tally) -> None:
        self.stored_bits, self._rounds_input, self._tally = bits, rounds_input, tally
        self._experts = dict[int | None, Parts]()

    def add(self, slot: Slot, entry: Entry) -> None:
        """One of its tensors."""
        self._experts.setdefault(slot.expert, {})[slot.parameter] = entry

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, index: int) -> Tensor | Quantised | Blocks:
        parts = self._parts(index, as_stored=True)
        if "" in parts:
            return parts[""]
        qdata, scale, zero = (parts.get(name) for name in ("qdata", "scale", "zero"))
        assert isinstance(qdata, Tensor) and isinstance(scale, Tensor)
        assert not isinstance(zero, Blocks)
        return Quantised(qdata, scale, zero, self._rounds_input)

    def value(self, part: str) -> Tensor:
        """See `UnreadMatrix`."""
        each = [self._parts(index, as_stored=False)[part] for index in range(len(self))]
        found = torch.stack([one for one in each if isinstance(one, Tensor)])
        return found[0] if None in self._experts else found

    def _parts(self, index: int, as_stored: bool) -> dict[str, Tensor | Blocks]:
        expert = None if None in self._experts else index
        return {
            split_part(name)[1].removeprefix("."): self._read(entry, as_stored)
            for name, entry in self._experts[expert].items()
        }

    def _read(self, entry: Entry, as_stored: bool) -> Tensor | Blocks:
        found: Tensor | Blocks
        try:
            blocks = entry.blocks if as_stored else None
            found = entry.read() if blocks is None else blocks()
            if tuple(found.shape) != entry.shape:
                raise ValueError(f"its shape was {list(entry.shape)}, and is {list(found.shape)}")
        except (OSError, SafetensorError, ValueError) as error:
            raise Unreadable(
                f"{entry.file}: {entry.name} cannot be read any more ({error}); restore the file, "
                "or load the model anew"
            ) from None
        if isinstance(found, Tensor) and found.dtype == torch.float64:
            found = found.float()
        try:
            require_finite(found if isinstance(found, Tensor) else scales_of(found), entry)
        except ValueError as error:
            raise Unreadable(str(error)) from None
        self._tally.add(entry)
        return found


def packed_later(plan: Plan, packing: Scheme, is_tied: bool, tally: Tally) -> dict[str, FileMatrix]:
    """The matrices to which a scheme gives few bits, and embeddings in a GGUF type, by name. A tied
    head is there with the embeddings, whose weights it shares.
    """
    found = dict[str, FileMatrix]()
    rounds_input = packing.activations is not None
    for entry, slot in plan.values():
        if is_tied and slot.weight.endswith("lm_head.weight"):
            continue
        name, stored = slot.weight, entry.stored
        is_table = name.endswith(EMBEDDINGS) and entry.blocks is not None
        if is_table or packed_bits(name, slot.shape, packing, stored) is not None:
            bits = stored_bits(name, stored)
            found.setdefault(name, FileMatrix(bits, rounds_input, tally)).add(slot, entry)
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
        if scheme is not None and slot.weight.endswith(EMBEDDINGS) and entry.blocks is not None:
            size = bytes_a_number(entry.stored) + is_tied  # as in the file, and the head's 8 bits
        elif scheme is not None and slot.weight == slot.parameter:
            bits = packed_bits(slot.weight, slot.shape, scheme, entry.stored)
            size = size if bits is None else _BYTES[bits]
        needed[side] += math.prod(entry.shape) * size
    return round(needed[0]), round(needed[1])
