"""Advance rows token by token: the context tower's choices (AR) or the denoiser's (mock-AR)."""

from collections.abc import Generator

from torch import Tensor

from twotower.diffusion import choose, draw_noise
from twotower.engine.batch import (
    Batch,
    Cycle,
    Proposal,
    commit,
    extend,
    last_tokens,
    start_at_once,
)
from twotower.engine.events import Event
from twotower.engine.logits import choose_allowed, require_finite, rows_logprobs
from twotower.engine.options import sampling_params
from twotower.engine.row import Row
from twotower.model import TwoTower


def _no_proposal(model: TwoTower, batch: Batch) -> Generator[Event, None, Proposal]:
    yield from ()
    return ()


def _settle_ar(model: TwoTower, batch: Batch, proposal: Proposal) -> Generator[Event, None, Batch]:
    """The context tower's last logits choose a token, which extends the cache."""
    logits = model.next_logits(batch.cache)
    tokens = choose_tokens(logits, batch.rows)
    chosen = [[token] for token in tokens.tolist()]
    logprobs = rows_logprobs(batch.rows, logits.unsqueeze(1), chosen)
    batch, kept = yield from commit(batch, chosen, logprobs)
    return (yield from extend(model, batch, tokens[kept.to(tokens.device)].unsqueeze(1)))


def _propose_token(model: TwoTower, batch: Batch) -> Generator[Event, None, Proposal]:
    """The denoiser reads each row's last token, seeded with the context before it, without t."""
    yield from ()
    last = last_tokens(batch.rows)
    logits = model.denoise(last, batch.cache.view(), None)[:, 0]
    for row in batch.rows:
        row.nfe += 1
    return last, choose_tokens(logits, batch.rows)


def _settle_mock_ar(
    model: TwoTower, batch: Batch, proposal: Proposal
) -> Generator[Event, None, Batch]:
    """Commit the denoiser's tokens; the context tower reads those before them."""
    last, tokens = proposal
    batch, kept = yield from commit(batch, [[token] for token in tokens.tolist()])
    return (yield from extend(model, batch, last[kept]))


def choose_tokens(logits: Tensor, rows: list[Row]) -> Tensor:
    """One token per row from its logits (B, V), by the row's own options and randomness: (B,)."""
    params = sampling_params([row.options for row in rows])
    noise = draw_noise(logits, params.temperature, [row.generator for row in rows])
    tokens = choose(require_finite(logits), params, noise)
    for place, row in enumerate(rows):
        if row.grammar is not None:
            row.grammar.follow(row.tokens)
            own = None if noise is None else noise[place]
            tokens[place] = choose_allowed(row, logits[place], own)
    return tokens


AR_CYCLE = Cycle(start=start_at_once, propose=_no_proposal, settle=_settle_ar)
# A check of the denoiser without diffusion. Source: system.md section 4, 'Mock-AR'.
MOCK_AR_CYCLE = Cycle(
    start=start_at_once, propose=_propose_token, settle=_settle_mock_ar, num_unread=1
)
