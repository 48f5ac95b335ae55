"""Where blocks are denoised: beside the context tower, or by a denoiser that is elsewhere."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from twotower.diffusion import Sampler, Step, denoise_block, most_probable, require_finite
from twotower.engine.choosing import ChoosingBackend
from twotower.engine.events import Event, StepTaken
from twotower.model import ContextView, TwoTower
from twotower.model.backend import RankingBackend

if TYPE_CHECKING:
    from twotower.engine.batch import Batch


class RowsAborted(Exception):
    """Nobody waits any more for a block that is being filled: of no row of the batch."""


class Blocks(NamedTuple):
    """What is to be filled: blocks (R, T) of the rows in slots (R,) of a batch; None: of all."""

    tokens: Tensor
    sampler: Sampler
    generators: Sequence[torch.Generator]
    slots: Tensor | None


class Denoiser(Protocol):
    """Fills blocks of one batch after another whose rows are mostly the same."""

    def fill(self, batch: "Batch", blocks: Blocks) -> Iterator[Step]:
        """`denoise_block` on the blocks, with the batch's texts as their context."""
        ...


def new_denoiser(model: TwoTower) -> Denoiser:
    """A denoiser for a new batch, where the tower is; a model may bring its own kind."""
    own: Callable[[], Denoiser] | None = getattr(model, "new_denoiser", None)
    if own is not None:
        return own()
    if model.denoiser_device == model.context_device:
        return LocalDenoiser()
    from twotower.engine.denoiser_copy import CopyDenoiser

    return CopyDenoiser()


def fill_blocks(
    batch: "Batch",
    blocks: Tensor,
    sampler: Sampler,
    slots: Tensor | None = None,
    num_known: int = 0,
) -> Generator[Event, None, Step]:
    """Fill the masked positions of blocks (R, T), at least one a row; returns the last step.

    The first `num_known` tokens of a block are text already: events leave them out. RowsAborted
    after a pass when all rows of the batch are cancelled or too late.
    """
    rows = batch.rows if slots is None else [batch.rows[slot] for slot in slots.tolist()]
    # A pass that fails, and is tried again, has drawn nothing.
    known = [row.generator.get_state() for row in rows] if sampler.is_random else []
    generators = [torch.Generator().set_state(state) for state in known]
    before = [row.nfe for row in rows]
    last: Step | None = None
    batch.denoiser = batch.denoiser or new_denoiser(batch.model)
    for last in batch.denoiser.fill(batch, Blocks(blocks, sampler, generators, slots)):
        parts = last.t, last.nfe, last.tokens, last.is_masked, last.confidence
        each = zip(rows, before, *map(Tensor.tolist, parts), strict=True)
        for row, passes, t, nfe, tokens, is_masked, confidence in each:
            row.nfe = passes + nfe
            # A row that reuses its last pass has a step too; filters have not seen these tokens.
            if t > 0 and not row.text.is_filtered:
                yield StepTaken(
                    row=row.index,
                    block_index=row.num_commits,
                    step=last.index,
                    t=t,
                    tokens=tokens[num_known:],
                    is_masked=is_masked[num_known:],
                    confidence=confidence[num_known:],
                    nfe=row.nfe,
                )
        now = time.monotonic()
        if all(row.abort_reason(now) is not None for row in batch.rows):
            raise RowsAborted
    for row, generator in zip(rows, generators, strict=False):
        row.generator = generator
    assert last is not None
    return last


class LocalDenoiser:
    """On the context tower's device: the cache itself is read."""

    def fill(self, batch: "Batch", blocks: Blocks) -> Iterator[Step]:
        return denoise_rows(batch.model, batch.cache.view(batch.model.config.reads), blocks)


def denoise_rows(model: TwoTower, view: ContextView, blocks: Blocks) -> Iterator[Step]:
    """`denoise_block` on blocks of a view's rows, by this process's denoiser tower."""
    tokens, sampler, generators, slots = blocks
    own = view if slots is None or len(slots) == view.num_rows else view.select(slots)
    if model.backend.chooses_tokens and sampler.kind == "confidence":
        return cast(ChoosingBackend, model.backend).fill(own, tokens, sampler, generators)
    held = list(range(own.num_rows)), own  # rows of a view are copied only when they change

    def denoise(tokens: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        nonlocal held
        if (wanted := rows.tolist()) != held[0]:
            held = wanted, own.select(rows)
        return require_finite(model.denoise(tokens, held[1], t))

    tokens = tokens.to(model.denoiser_device)
    backend = model.backend
    rank = cast(RankingBackend, backend).rank if backend.ranks_tokens else most_probable
    return denoise_block(denoise, tokens, sampler, generators, model.draft_ids, rank)
