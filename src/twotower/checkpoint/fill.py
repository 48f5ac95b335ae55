"""Values of a checkpoint into their places, shard by shard, quantised on the way where wanted.

Peak memory is the model plus a portion of one file.
"""

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint.files import Entry
from twotower.checkpoint.names import Slot
from twotower.checkpoint.quantize import quantise
from twotower.model.precision import matrix_at
from twotower.model.two_tower import TwoTower

Plan = dict[str, tuple[Entry, Slot]]
_PORTION = 2**25  # elements read from a file before it is opened anew


class Tally:
    """How much of a checkpoint has been read. show: gets the share of it after each tensor."""

    def __init__(self, plan: Plan, show: Callable[[float], None] | None) -> None:
        self._all = sum(math.prod(entry.shape) for entry, _ in plan.values())
        self._read, self._show = 0, show

    def add(self, entry: Entry) -> None:
        """A tensor was read."""
        self._read += math.prod(entry.shape)
        if self._show is not None:
            self._show(min(1.0, self._read / self._all))


def fill(model: TwoTower, plan: Plan, tally: Tally) -> None:
    """Copy every tensor to its place and check that it is finite there.

    A tensor in full precision whose parameter has few bits is quantised: both at once never exist
    for more than one.
    """
    targets = model.state_dict()
    for name, source, slot in _stream(plan):
        if slot.parameter in targets:
            target = _place(targets[slot.parameter], slot)
            target.copy_(source)
            require_finite(target, plan[name][0])
        else:
            require_finite(source, plan[name][0])
            _fill_quantised(model, source, slot)
        tally.add(plan[name][0])


def _fill_quantised(model: TwoTower, source: Tensor, slot: Slot) -> None:
    holder = matrix_at(model, slot.parameter)
    if source.dim() == 3:  # all experts of a layer in one tensor
        for expert, matrix in enumerate(source):
            _fill_quantised(model, matrix, slot._replace(expert=expert))
        return
    made = quantise(source, holder.bits, holder.group_size)
    for part in ("qdata", "scale", "zero"):
        value = getattr(made, part)
        if value is not None:
            _place(getattr(holder, part), slot).copy_(value)


def _place(target: Tensor, slot: Slot) -> Tensor:
    return target if slot.expert is None else target[slot.expert]


def require_finite(target: Tensor, entry: Entry) -> None:
    """ValueError (one line) for values of a tensor that are none."""
    low, high = torch.aminmax(target)  # one pass, no temporaries; NaN wins in both
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise ValueError(
            f"{entry.file}: {entry.name} holds NaN or infinite values as {target.dtype}; "
            "fetch or train the checkpoint again"
        )


def _stream(plan: Plan) -> Iterator[tuple[str, Tensor, Slot]]:
    """Tensors in the order of the shards. Pages that were read stay in memory while a file is open,
    so it is opened anew for every portion.
    """
    for file, group in _portions(plan):
        for name in [name for name in group if plan[name][0].load is not None]:
            yield name, plan[name][0].read(), plan[name][1]
        if not (plain := [name for name in group if plan[name][0].load is None]):
            continue
        with safe_open(file, framework="pt") as shard:
            for name in plain:
                entry, slot = plan[name]
                yield name, shard.get_tensor(entry.name), slot


def _portions(plan: Plan) -> Iterator[tuple[Path, list[str]]]:
    """Names of one file each, of about `_PORTION` elements."""
    by_file = sorted(plan, key=lambda name: str(plan[name][0].file))
    for file, group in groupby(by_file, key=lambda name: plan[name][0].file):
        portion: list[str] = []
        size = 0
        for name in group:
            portion.append(name)
            size += math.prod(plan[name][0].shape)
            if size >= _PORTION:
                yield file, portion
                portion, size = [], 0
        if portion:
            yield file, portion
