"""Advance rows block by block: denoise, commit, extend the context."""

from collections.abc import Generator

import torch
from torch import Tensor

from twotower.engine.batch import Batch, Cycle, Proposal, commit, extend, start_at_once
from twotower.engine.events import Event
from twotower.engine.fill import fill_blocks
from twotower.engine.logits import rows_logprobs
from twotower.engine.token_cycle import choose_tokens
from twotower.model import TwoTower


def _propose(model: TwoTower, batch: Batch) -> Generator[Event, None, Proposal]:
    """One block of every row, from masked to all committed: its tokens (B, T)."""
    rows = batch.rows
    samplers = [row.options.block_sampler(model.config.mask_token_id) for row in rows]
    tokens = _open_blocks(model, batch)
    batch.seat.follow(batch.cache)
    last = yield from fill_blocks(batch.seat, rows, tokens, samplers)
    return (last.tokens,)


def _open_blocks(model: TwoTower, batch: Batch) -> Tensor:
    """Blocks (B, T) before the first pass: masks, but for first tokens that the context chose."""
    block_size = batch.rows[0].options.block_size
    blocks = torch.full((len(batch.rows), block_size), model.config.mask_token_id)
    given = [i for i, row in enumerate(batch.rows) if row.options.first_token == "context"]
    if given and block_size > 1:  # a block needs something to fill
        logits = model.next_logits(batch.cache)[given]
        blocks[given, 0] = choose_tokens(logits, [batch.rows[i] for i in given]).cpu()
    return blocks


def _settle(model: TwoTower, batch: Batch, proposal: Proposal) -> Generator[Event, None, Batch]:
    """Commit the blocks; the context tower reads those of the rows that go on."""
    (tokens,) = proposal
    if any(row.options.logprobs is not None for row in batch.rows):
        return (yield from _settle_read(model, batch, tokens))
    batch, kept = yield from commit(batch, tokens.tolist())
    return (yield from extend(model, batch, tokens[kept.to(tokens.device)]))


def _settle_read(model: TwoTower, batch: Batch, tokens: Tensor) -> Generator[Event, None, Batch]:
    """The same with the blocks read first: rows ask how probable their tokens are, to the last."""
    first = model.next_logits(batch.cache).unsqueeze(1)
    following = model.context_head(model.extend(batch.cache, tokens)[:, :-1])
    logprobs = rows_logprobs(batch.rows, torch.cat([first, following], dim=1), tokens.tolist())
    for row in batch.rows:
        row.context_forwards += row.options.logprobs is not None
    batch, _ = yield from commit(batch, tokens.tolist(), logprobs)
    for row in batch.rows:
        row.context_forwards += row.options.logprobs is None  # as if it had been alone
    return batch


BLOCK_CYCLE = Cycle(start=start_at_once, propose=_propose, settle=_settle)
