"""Where blocks are denoised: beside the context tower, on another device, or on another host.

A denoiser elsewhere keeps a copy of the batch's cache. Before a block the copy follows the batch:
rows that left are dropped, and only what the context tower has read since travels.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from twotower.diffusion import Sampler, Step, denoise_block
from twotower.engine.events import Event, StepTaken
from twotower.engine.logits import require_finite
from twotower.model import ContextCache, ContextView, TwoTower
from twotower.model.state import CacheDelta

if TYPE_CHECKING:
    from twotower.engine.batch import Batch


class RowsLeft(Exception):
    """Nobody waits any more for a block that is being filled: of no row of the batch."""


class Blocks(NamedTuple):
    """What is to be filled: blocks (R, T) of a batch's rows at places (R,), of all where None."""

    tokens: Tensor
    sampler: Sampler
    generators: Sequence[torch.Generator]
    places: Tensor | None


class Denoiser(Protocol):
    """Fills blocks of one batch after another whose rows are mostly the same."""

    def fill(self, batch: "Batch", blocks: Blocks) -> Iterator[Step]:
        """`denoise_block` on the blocks, with the batch's texts as their context."""
        ...


@runtime_checkable
class HasDenoiser(Protocol):
    """A model that brings its own kind of denoiser."""

    def new_denoiser(self) -> Denoiser:
        """A denoiser for a new batch."""
        ...


def new_denoiser(model: TwoTower) -> Denoiser:
    """A denoiser for a new batch, where the model's denoiser tower is."""
    if isinstance(model, HasDenoiser):
        return model.new_denoiser()
    if model.denoiser_device == model.context_device:
        return LocalDenoiser()
    return CopyDenoiser()


def fill_blocks(
    batch: "Batch",
    blocks: Tensor,
    sampler: Sampler,
    places: Tensor | None = None,
    num_known: int = 0,
) -> Generator[Event, None, Step]:
    """Fill the masked positions of blocks (R, T), at least one a row; returns the last step.

    The first `num_known` tokens of a block are text already: events leave them out. RowsLeft after
    a pass when all rows of the batch are cancelled or too late.
    """
    rows = batch.rows if places is None else [batch.rows[place] for place in places.tolist()]
    generators = [row.generator for row in rows]
    before = [row.nfe for row in rows]
    last: Step | None = None
    for last in batch.denoiser.fill(batch, Blocks(blocks, sampler, generators, places)):
        for index in last.t.nonzero().flatten().tolist():  # also rows that reuse their last pass
            row = rows[index]
            row.nfe = before[index] + int(last.nfe[index])
            if not row.is_filtered:  # its filters have not seen these tokens
                yield StepTaken(
                    row=row.index,
                    block_index=row.num_commits,
                    step=last.index,
                    t=float(last.t[index]),
                    tokens=last.tokens[index, num_known:].tolist(),
                    is_masked=last.is_masked[index, num_known:].tolist(),
                    confidence=last.confidence[index, num_known:].tolist(),
                    nfe=row.nfe,
                )
        now = time.monotonic()
        if all(row.reason_to_leave(now) is not None for row in batch.rows):
            raise RowsLeft
    assert last is not None
    return last


class LocalDenoiser:
    """On the context tower's device: the cache itself is read."""

    def fill(self, batch: "Batch", blocks: Blocks) -> Iterator[Step]:
        return denoise_rows(batch.model, batch.cache.view(), blocks)


class CopyDenoiser:
    """On another device of this process: a copy of the cache is read."""

    def __init__(self) -> None:
        self._follower = Follower()
        self._copy: CacheCopy | None = None

    def fill(self, batch: "Batch", blocks: Blocks) -> Iterator[Step]:
        device = batch.model.denoiser_device
        if self._copy is None:
            self._copy = CacheCopy(batch.model.empty_cache(1, device))
        sources, delta = self._follower.lacks(batch)
        self._copy.update(sources, delta.to(device))
        self._follower.holds(batch)
        return denoise_rows(batch.model, self._copy.cache.view(), blocks)


class CacheCopy:
    """The copy of a batch's cache. empty: a cache of one row before its first token."""

    def __init__(self, empty: ContextCache) -> None:
        self.cache, self._empty = empty.select(torch.tensor([0])), empty

    def update(self, sources: Sequence[int], delta: CacheDelta) -> None:
        """Become the cache of rows which were the `sources` of this one, -1 for a new row, and have
        read what is in the delta since.
        """
        if list(sources) != list(range(self.cache.num_rows)):
            self.cache.append(self._empty)  # the last row, which -1 picks
            self.cache = self.cache.select(torch.tensor(sources))
        self.cache.apply_delta(delta)


class Follower:
    """Knows what a copy holds. After a failure between `lacks` and `holds` it is made anew."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}  # tokens of each row, by its index, in the copy's order

    def lacks(self, batch: "Batch") -> tuple[list[int], CacheDelta]:
        """What `CacheCopy.update` needs to become the batch's cache."""
        held, self._held = self._held, {}
        order, indices = list(held), [row.index for row in batch.rows]
        sources = [order.index(index) if index in held else -1 for index in indices]
        lengths = torch.tensor([held.get(index, 0) for index in indices])
        return sources, batch.cache.delta_since(lengths)

    def holds(self, batch: "Batch") -> None:
        """The copy is the batch's cache now."""
        lengths = batch.cache.lengths.tolist()
        self._held = {row.index: n for row, n in zip(batch.rows, lengths, strict=True)}


def denoise_rows(model: TwoTower, view: ContextView, blocks: Blocks) -> Iterator[Step]:
    """`denoise_block` on blocks of a view's rows, by this process's denoiser tower."""
    tokens, sampler, generators, places = blocks
    own = view if places is None or len(places) == view.num_rows else view.select(places)
    held = list(range(own.num_rows)), own  # rows of a view are copied only when they change

    def denoise(tokens: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        nonlocal held
        if (wanted := rows.tolist()) != held[0]:
            held = wanted, own.select(rows)
        return require_finite(model.denoise(tokens, held[1], t))

    tokens = tokens.to(model.denoiser_device)
    return denoise_block(denoise, tokens, sampler, generators, model.draft_ids)
