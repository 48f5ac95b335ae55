"""int4 as the library packs it, read back, and the same in plain PyTorch."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.native.packing import Packed


class Groups(NamedTuple):
    """A matrix (N, K): numbers 0 to 15 uint8 (N, K), scale and offset float16 (N, K/32); a weight
    is number * scale + offset."""

    numbers: Tensor
    scale: Tensor
    offset: Tensor

    def values(self) -> Tensor:
        scale, offset = (part.float().unsqueeze(-1) for part in self[1:])
        return (self.numbers.unflatten(1, (-1, 32)) * scale + offset).flatten(1)


def packed_groups(weight: Tensor) -> Groups:
    """Of a weight (N, K), K a multiple of 32."""
    return unpacked(Packed({"": weight}, {"": 4}), weight.shape)


def unpacked(packed: Packed, shape: Sequence[int]) -> Groups:
    """Of the one matrix (N, K) that is packed, by the name ""."""
    rows, width = shape
    memory = (ctypes.c_uint8 * packed.num_bytes).from_address(packed.addresses[""])
    blocks = torch.frombuffer(memory, dtype=torch.uint8).clone().view(-1, width // 32, 320)
    bytes_, *grids = blocks.split([256, 32, 32], dim=2)
    quads = bytes_.view(*blocks.shape[:2], 4, 16, 4).permute(0, 3, 1, 2, 4).flatten(3)
    numbers = torch.cat([quads & 15, quads >> 4], dim=-1).flatten(0, 1).flatten(1)
    halves = [grid.contiguous().view(torch.float16).transpose(1, 2).flatten(0, 1) for grid in grids]
    assert not any(part[rows:].any() for part in (numbers, *halves))
    return Groups(*(part[:rows] for part in (numbers, *halves)))


def plain_groups(weight: Tensor) -> Groups:
    """Each group on the better of two grids: from its least to its largest number, and from -8 to 7
    times a scale."""
    groups = weight.float().unflatten(1, (-1, 32))
    least, most = groups.aminmax(dim=-1)
    largest = torch.where(most > -least, most, least)
    one = _on_grid(groups, (most - least) / 15, least)
    two = _on_grid(groups, largest / -8, largest)
    errors = [(g.values().unflatten(1, (-1, 32)) - groups).square().sum(-1) for g in (one, two)]
    is_second = errors[1] < errors[0]
    each = is_second.repeat_interleave(32, dim=1), is_second, is_second
    parts = zip(each, two, one, strict=True)
    return Groups(*(torch.where(chosen, a, b) for chosen, a, b in parts))


def _on_grid(groups: Tensor, scale: Tensor, offset: Tensor) -> Groups:
    scale, offset = scale.half(), offset.half()
    step, start = scale.float().unsqueeze(-1), offset.float().unsqueeze(-1)
    numbers = ((groups - start) * torch.where(step != 0, 1 / step, 0.0)).round().clamp(0, 15)
    return Groups(numbers.nan_to_num(0.0).to(torch.uint8).flatten(1), scale, offset)
