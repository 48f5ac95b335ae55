"""Advance rows block by block: denoise, commit, extend the context."""

from collections.abc import Generator

import torch
from torch import Tensor

from twotower.engine.batch import Batch, Cycle, Proposal, commit, extend, start_at_once
from twotower.engine.events import Event
from twotower.engine.fill import fill_blocks
from twotower.engine.logits import require_finite, rows_logprobs
from twotower.engine.row import Row
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
    given = [i for i, row in enumerate(batch.rows) if row.options.is_opened_by_context]
    if given and block_size > 1:  # a block needs something to fill
        logits = model.next_logits(batch.cache)[given]
        blocks[given, 0] = choose_tokens(logits, [batch.rows[i] for i in given]).cpu()
    return blocks


def _settle(model: TwoTower, batch: Batch, proposal: Proposal) -> Generator[Event, None, Batch]:
    """Commit the blocks; the context tower reads those of the rows that go on."""
    (tokens,) = proposal
    if any(_is_read_first(row) for row in batch.rows):
        return (yield from _settle_read(model, batch, tokens))
    batch, kept = yield from commit(batch, tokens.tolist())
    return (yield from extend(model, batch, tokens[kept.to(tokens.device)]))


def _is_read_first(row: Row) -> bool:
    """Whether the context tower judges the row's blocks before they are committed, to the last."""
    return row.options.logprobs is not None or row.options.is_reviewed


def _least_chance(row: Row) -> float:
    """The probability below which the context tower gives a token of the row's block back."""
    return row.options.review_threshold if row.options.is_reviewed else 0.0


def _settle_read(model: TwoTower, batch: Batch, tokens: Tensor) -> Generator[Event, None, Batch]:
    """The same with the blocks read first: for how probable their tokens are, and their review."""
    rows = batch.rows
    output = model.verify(batch.cache, tokens)
    first = model.next_logits(batch.cache).unsqueeze(1)
    # Before the cache takes the blocks: later, one damaged row would end its neighbours too.
    logits = require_finite(torch.cat([first, model.context_head(output.hidden[:, :-1])], dim=1))
    least = torch.tensor([_least_chance(row) for row in rows])
    counts = count_plausible(tokens.to(logits.device), logits, least.to(logits.device)).cpu()
    batch.cache.commit(output, counts)
    kept = [own[:count] for own, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
    logprobs = rows_logprobs(rows, logits, kept)
    for row, own in zip(rows, kept, strict=True):
        row.context_forwards += _is_read_first(row)
        if row.options.is_reviewed:
            row.given_back = tokens.shape[1] - len(own)
    batch, _ = yield from commit(batch, kept, logprobs)
    for row in batch.rows:
        row.context_forwards += not _is_read_first(row)  # as if it had been alone
    return batch


def count_plausible(tokens: Tensor, logits: Tensor, least: Tensor) -> Tensor:
    """How many tokens of blocks (B, T) stand: the first, and all up to one whose probability under
    the logits (B, T, V) that chose its place is below least (B,). Returns (B,) >= 1.
    """
    chances = logits.softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    is_plausible = chances[:, 1:] >= least.unsqueeze(1)
    return is_plausible.long().cumprod(1).sum(1) + 1


BLOCK_CYCLE = Cycle(start=start_at_once, propose=_propose, settle=_settle)
