"""Advance rows block by block: denoise, commit, extend the context. Rows leave as they end."""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from twotower.diffusion import Step, denoise_block
from twotower.engine.events import Event, StepTaken
from twotower.engine.logits import require_finite
from twotower.engine.prefill import prefill
from twotower.engine.row import Row
from twotower.model import ContextCache, ContextView, TwoTower


def block_loop(model: TwoTower, rows: list[Row]) -> Iterator[Event]:
    """Decode rows that share mode and block size until each has ended."""
    cache = prefill(model, rows, [row.prompt for row in rows])
    while True:
        tokens = yield from _next_block(model, rows, cache)
        for row, block in zip(rows, tokens.tolist(), strict=True):
            yield row.commit(block)
            if row.is_finished:
                yield row.finished()
        kept = torch.tensor(
            [i for i, row in enumerate(rows) if not row.is_finished], dtype=torch.int64
        )
        if not len(kept):
            return
        if len(kept) < len(rows):
            cache, tokens = cache.select(kept), tokens[kept]
            rows = [rows[i] for i in kept.tolist()]
        model.extend(cache, tokens)
        for row in rows:
            row.context_forwards += 1


def _next_block(
    model: TwoTower, rows: list[Row], cache: ContextCache
) -> Generator[Event, None, Tensor]:
    """One block of every row, from all masked to all committed; returns its tokens (B, T)."""
    mask_token_id = model.config.mask_token_id
    shape = (len(rows), rows[0].options.block_size)
    tokens = torch.full(shape, mask_token_id, device=model.denoiser_device)
    samplers = [row.options.block_sampler(mask_token_id) for row in rows]
    generators = [row.generator for row in rows]
    before = [row.nfe for row in rows]
    denoise = _Denoise(model, cache.view())
    for step in denoise_block(denoise, tokens, samplers, generators):
        for index in step.t.nonzero().flatten().tolist():  # also rows that reuse their last pass
            rows[index].nfe = before[index] + int(step.nfe[index])
            yield _step_taken(rows[index], step, index)
        tokens = step.tokens
    return tokens


def _step_taken(row: Row, step: Step, index: int) -> StepTaken:
    return StepTaken(
        row=row.index,
        block_index=row.num_commits,
        step=step.index,
        t=float(step.t[index]),
        tokens=step.tokens[index].tolist(),
        is_masked=step.is_masked[index].tolist(),
        confidence=step.confidence[index].tolist(),
        nfe=row.nfe,
    )


class _Denoise:
    """The denoiser over some rows of one block; copies rows of the view only when they change."""

    def __init__(self, model: TwoTower, view: ContextView) -> None:
        self._model = model
        self._all = self._view = view.to(model.denoiser_device)
        self._rows = list(range(view.num_rows))

    def __call__(self, tokens: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        wanted = rows.tolist()
        if wanted != self._rows:
            self._rows, self._view = wanted, self._all.select(rows)
        return require_finite(self._model.denoise(tokens, self._view, t))
