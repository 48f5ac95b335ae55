"""Experts left in their files: views of read-only mappings, which the system reads when they are
chosen and may forget when memory is short. So a tower larger than memory still runs.
"""

import json
import math
import mmap
import warnings
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.checkpoint import names
from twotower.checkpoint.files import DTYPES, PACKED_DTYPES, Entry
from twotower.checkpoint.fill import Plan
from twotower.kernels.quantised import Matrices, Quantised
from twotower.model.precision import matrix_at, scheme_of, stacks
from twotower.model.two_tower import TwoTower


def split_experts(model: TwoTower, plan: Plan) -> tuple[Plan, dict[str, Matrices]]:
    """A plan without the routed experts, and their matrices as views of the files by stack name.

    ValueError (one line) for a model without experts.
    """
    wanted = stacks(model)
    if not wanted:
        raise ValueError(
            "expert_storage='mmap': this model has no experts; use expert_storage='memory'"
        )
    found: dict[str, dict[int, Tensor]] = defaultdict(dict)
    rest, files = Plan(), _Files()
    for name, (entry, slot) in plan.items():
        if names.split_part(slot.parameter)[0] not in wanted:
            rest[name] = (entry, slot)
        elif slot.expert is None:  # all of a layer in one tensor
            found[slot.parameter] |= dict(enumerate(files.view(entry)))
        else:
            found[slot.parameter][slot.expert] = files.view(entry)
    is_wide = scheme_of(model) is None
    return rest, {
        name: _ordered(found[name]) if is_wide else _quantised(model, name, found)
        for name in wanted
    }


def _ordered(tensors: dict[int, Tensor]) -> list[Tensor]:
    return [tensors[expert] for expert in range(len(tensors))]


def _quantised(model: TwoTower, name: str, found: dict[str, dict[int, Tensor]]) -> list[Quantised]:
    stack = matrix_at(model, name)
    parts = [_ordered(found[f"{name}.{part}"]) for part in ("qdata", "scale")]
    zeros = [None] * len(stack) if stack.zero is None else _ordered(found[f"{name}.zero"])
    rows = zip(*parts, zeros, strict=True)
    return [Quantised(qdata, scale, zero, stack.rounds_input) for qdata, scale, zero in rows]


def of_both_towers(matrices: dict[str, Matrices]) -> dict[str, Matrices]:
    """The context tower's experts, and the same ones for a denoiser that is a copy of it."""
    prefix = "context_tower."
    copies = {f"denoiser_tower.{n.removeprefix(prefix)}": m for n, m in matrices.items()}
    return copies | matrices


class _File(NamedTuple):
    """A mapped safetensors file: its bytes, where values begin, and each tensor's two offsets."""

    content: Tensor
    start: int
    offsets: dict[str, tuple[int, int]]


class _Files:
    """Mappings of the files asked for so far; a view keeps its mapping alive."""

    def __init__(self) -> None:
        self._open: dict[Path, _File] = {}

    def view(self, entry: Entry) -> Tensor:
        """A tensor of a file without reading it; it must not be written to."""
        if entry.load is not None:
            raise ValueError(
                f"expert_storage='mmap': {entry.file}: {entry.name} cannot be mapped as the file "
                "keeps it; use expert_storage='memory', or write the checkpoint anew with: "
                "twotower convert SOURCE TARGET"
            )
        if entry.file not in self._open:
            self._open[entry.file] = _map(entry.file)
        file = self._open[entry.file]
        dtype = (DTYPES | PACKED_DTYPES)[entry.dtype]
        begin, end = (file.start + offset for offset in file.offsets[entry.name])
        if begin % dtype.itemsize or end - begin != math.prod(entry.shape) * dtype.itemsize:
            raise ValueError(
                f"{entry.file}: {entry.name} does not begin where {entry.dtype} can be mapped; "
                "write the checkpoint anew with: twotower convert SOURCE TARGET"
            )
        return file.content[begin:end].view(dtype).view(entry.shape)


def _map(path: Path) -> _File:
    with path.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapping[:8], "little")
    header = json.loads(mapping[8 : 8 + length])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        content = torch.frombuffer(mapping, dtype=torch.uint8)
    offsets = {
        name: tuple(values["data_offsets"])
        for name, values in header.items()
        if name != "__metadata__"
    }
    return _File(content, 8 + length, offsets)
