"""Advance rows block by block: denoise, commit, extend the context."""

from collections.abc import Generator

import torch

from twotower.engine.batch import Batch, Cycle, Proposal, commit, extend
from twotower.engine.events import Event
from twotower.engine.fill import fill_blocks
from twotower.engine.prefill import prefill
from twotower.engine.row import Row
from twotower.model import TwoTower


def _start(model: TwoTower, rows: list[Row]) -> Generator[Event, None, Batch]:
    yield from ()
    return Batch(rows, prefill(model, rows, [row.prompt for row in rows]))


def _propose(model: TwoTower, batch: Batch) -> Generator[Event, None, Proposal]:
    """One block of every row, from all masked to all committed: its tokens (B, T)."""
    rows = batch.rows
    mask_token_id = model.config.mask_token_id
    shape = (len(rows), rows[0].options.block_size)
    tokens = torch.full(shape, mask_token_id, device=model.denoiser_device)
    samplers = [row.options.block_sampler(mask_token_id) for row in rows]
    last = yield from fill_blocks(model, batch.cache.view(), rows, tokens, samplers)
    return (last.tokens,)


def _settle(model: TwoTower, batch: Batch, proposal: Proposal) -> Generator[Event, None, Batch]:
    """Commit the blocks; the context tower reads those of the rows that go on."""
    (tokens,) = proposal
    batch, kept = yield from commit(batch, tokens.tolist())
    extend(model, batch, tokens[kept.to(tokens.device)])
    return batch


BLOCK_CYCLE = Cycle(start=_start, propose=_propose, settle=_settle)
