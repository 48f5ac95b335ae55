"""Advance rows block by block: denoise, commit, extend the context."""

from collections.abc import Generator

import torch
from torch import Tensor

from twotower.diffusion import Step, denoise_block
from twotower.engine.batch import Batch, Cycle, Proposal, commit, extend
from twotower.engine.events import Event, StepTaken
from twotower.engine.logits import require_finite
from twotower.engine.prefill import prefill
from twotower.engine.row import Row
from twotower.model import ContextView, TwoTower


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
    generators = [row.generator for row in rows]
    before = [row.nfe for row in rows]
    denoise = _Denoise(model, batch.cache.view())
    for step in denoise_block(denoise, tokens, samplers, generators):
        for index in step.t.nonzero().flatten().tolist():  # also rows that reuse their last pass
            rows[index].nfe = before[index] + int(step.nfe[index])
            yield _step_taken(rows[index], step, index)
        tokens = step.tokens
    return (tokens,)


def _settle(model: TwoTower, batch: Batch, proposal: Proposal) -> Generator[Event, None, Batch]:
    """Commit the blocks; the context tower reads those of the rows that go on."""
    (tokens,) = proposal
    batch, kept = yield from commit(batch, tokens.tolist())
    extend(model, batch, tokens[kept.to(tokens.device)])
    return batch


BLOCK_CYCLE = Cycle(start=_start, propose=_propose, settle=_settle)


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
