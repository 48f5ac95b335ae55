"""Advance rows token by token: the context tower's choices (AR) or the denoiser's (mock-AR)."""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from twotower.diffusion import choose, draw_noise
from twotower.engine.events import Event
from twotower.engine.logits import require_finite
from twotower.engine.options import sampling_params
from twotower.engine.prefill import prefill
from twotower.engine.row import Row
from twotower.model import TwoTower


def ar_loop(model: TwoTower, rows: list[Row]) -> Iterator[Event]:
    """The context tower alone: its last logits choose a token, which extends the cache."""
    cache = prefill(model, rows, [row.prompt for row in rows])
    while True:
        tokens = _choose(model.next_logits(cache), rows)
        kept = yield from _commit(tokens, rows)
        if not len(kept):
            return
        if len(kept) < len(rows):
            cache = cache.select(kept)
            rows = [rows[i] for i in kept.tolist()]
        model.extend(cache, tokens[kept.to(tokens.device)].unsqueeze(1))
        for row in rows:
            row.context_forwards += 1


def mock_ar_loop(model: TwoTower, rows: list[Row]) -> Iterator[Event]:
    """The denoiser reads each row's last token, seeded with the context before it, without t.

    A check of the denoiser without diffusion. Source: system.md section 4, 'Mock-AR'.
    """
    cache = prefill(model, rows, [row.prompt[:-1] for row in rows])
    last = torch.tensor([[row.prompt[-1]] for row in rows])  # (B, 1), not yet in the cache
    while True:
        logits = model.denoise(last, cache.view(), None)[:, 0]
        for row in rows:
            row.nfe += 1
        tokens = _choose(logits, rows)
        kept = yield from _commit(tokens, rows)
        if not len(kept):
            return
        if len(kept) < len(rows):
            cache, last, tokens = cache.select(kept), last[kept], tokens[kept.to(tokens.device)]
            rows = [rows[i] for i in kept.tolist()]
        model.extend(cache, last)
        last = tokens.unsqueeze(1).cpu()
        for row in rows:
            row.context_forwards += 1


def _choose(logits: Tensor, rows: list[Row]) -> Tensor:
    """One token per row from its logits (B, V), by the row's own options and randomness: (B,)."""
    params = sampling_params([row.options for row in rows])
    noise = draw_noise(logits, params.temperature, [row.generator for row in rows])
    return choose(require_finite(logits), params, noise)


def _commit(tokens: Tensor, rows: list[Row]) -> Generator[Event, None, Tensor]:
    """Hand each row its token; returns the numbers of the rows that go on."""
    for row, token in zip(rows, tokens.tolist(), strict=True):
        yield row.commit([token])
        if row.is_finished:
            yield row.finished()
    return torch.tensor([i for i, row in enumerate(rows) if not row.is_finished], dtype=torch.int64)
