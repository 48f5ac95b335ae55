"""Where blocks are denoised: beside the context tower, on another device, or on another host.

A seat holds what the denoiser knows of a batch's texts. It follows the context tower's cache: only
what was read since the last time travels, never the whole cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from twotower.diffusion import BlockSampler, Step, denoise_block
from twotower.engine.logits import require_finite
from twotower.model import ContextCache, ContextView, TwoTower


class Seat(Protocol):
    """The denoiser's side of one batch; rows are those of the batch, in its order."""

    def follow(self, cache: ContextCache) -> None:
        """Take over what the context tower has read since the last call."""
        ...

    def part(self, places: Tensor) -> "Seat":
        """A seat for some of the rows: places (R,) int64."""
        ...

    def join(self, cache: ContextCache, other: "Seat", others: ContextCache) -> "Seat":
        """A seat for these rows and then the other's, which is of the same kind; their caches."""
        ...

    def fill(
        self,
        rows: Tensor | None,
        blocks: Tensor,
        samplers: Sequence[BlockSampler],
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        """`denoise_block` on blocks (R, T) of some rows (R,), or of all when None."""
        ...


@runtime_checkable
class HasSeat(Protocol):
    """A model that brings its own kind of seat."""

    def seat(self) -> Seat:
        """A seat for rows that it has heard nothing of."""
        ...


def take_seat(model: TwoTower) -> Seat:
    """A seat where the model's denoiser is, for rows that it has heard nothing of."""
    if isinstance(model, HasSeat):
        return model.seat()
    if model.denoiser_device == model.context_device:
        return _SharedSeat(model, None)
    return CopySeat(model, None)


@dataclass
class _SharedSeat:
    """On the context tower's device: the cache itself is read."""

    model: TwoTower
    view: ContextView | None

    def follow(self, cache: ContextCache) -> None:
        self.view = cache.view()

    def part(self, places: Tensor) -> "_SharedSeat":
        return _SharedSeat(self.model, None)

    def join(self, cache: ContextCache, other: Seat, others: ContextCache) -> "_SharedSeat":
        return _SharedSeat(self.model, None)

    def fill(
        self,
        rows: Tensor | None,
        blocks: Tensor,
        samplers: Sequence[BlockSampler],
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        assert self.view is not None  # followed before
        return denoise_rows(self.model, self.view, rows, blocks, samplers, generators)


@dataclass
class CopySeat:
    """On another device: a copy of the cache that grows by what is new."""

    model: TwoTower
    copy: ContextCache | None

    def follow(self, cache: ContextCache) -> None:
        if self.copy is None:
            self.copy = cache.empty_like(self.model.denoiser_device)
        self.copy.apply_delta(cache.delta_since(self.copy.lengths).to(self.model.denoiser_device))

    def part(self, places: Tensor) -> "CopySeat":
        return CopySeat(self.model, None if self.copy is None else self.copy.select(places))

    def join(self, cache: ContextCache, other: Seat, others: ContextCache) -> "CopySeat":
        assert isinstance(other, CopySeat)
        if self.copy is None and other.copy is None:
            return CopySeat(self.model, None)
        self.follow(cache)
        other.follow(others)
        assert self.copy is not None and other.copy is not None
        return CopySeat(self.model, self.copy.concat(other.copy))

    def fill(
        self,
        rows: Tensor | None,
        blocks: Tensor,
        samplers: Sequence[BlockSampler],
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        assert self.copy is not None  # followed before
        return denoise_rows(self.model, self.copy.view(), rows, blocks, samplers, generators)


def denoise_rows(
    model: TwoTower,
    view: ContextView,
    rows: Tensor | None,
    blocks: Tensor,
    samplers: Sequence[BlockSampler],
    generators: Sequence[torch.Generator],
) -> Iterator[Step]:
    """`denoise_block` on blocks (R, T) of some rows (R,) of a view, by this process's denoiser."""
    own = view if rows is None or len(rows) == view.num_rows else view.select(rows)
    return denoise_block(
        _Denoise(model, own), blocks.to(model.denoiser_device), samplers, generators
    )


class _Denoise:
    """The denoiser over some rows of one block; copies rows of the view only when they change."""

    def __init__(self, model: TwoTower, view: ContextView) -> None:
        self._model = model
        self._all = self._view = view
        self._rows = list(range(view.num_rows))

    def __call__(self, tokens: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        wanted = rows.tolist()
        if wanted != self._rows:
            self._rows, self._view = wanted, self._all.select(rows)
        return require_finite(self._model.denoise(tokens, self._view, t))
