"""Denoiser passes over one block of several rows, told as events."""

from collections.abc import Generator, Sequence

from torch import Tensor

from twotower.diffusion import BlockSampler, Step, denoise_block
from twotower.engine.events import Event, StepTaken
from twotower.engine.logits import require_finite
from twotower.engine.row import Row
from twotower.model import ContextView, TwoTower


def fill_blocks(
    model: TwoTower,
    view: ContextView,
    rows: list[Row],
    blocks: Tensor,
    samplers: Sequence[BlockSampler],
    num_known: int = 0,
) -> Generator[Event, None, Step]:
    """Fill the masked positions of blocks (B, T), at least one a row; returns the last step.

    The first `num_known` tokens of a block are text already: events leave them out.
    """
    generators = [row.generator for row in rows]
    before = [row.nfe for row in rows]
    denoise = _Denoise(model, view)
    last: Step | None = None
    for last in denoise_block(denoise, blocks.to(model.denoiser_device), samplers, generators):
        for index in last.t.nonzero().flatten().tolist():  # also rows that reuse their last pass
            rows[index].nfe = before[index] + int(last.nfe[index])
            if not rows[index].is_filtered:  # filters have not seen these tokens
                yield _step_taken(rows[index], last, index, num_known)
    assert last is not None
    return last


def _step_taken(row: Row, step: Step, index: int, first: int) -> StepTaken:
    return StepTaken(
        row=row.index,
        block_index=row.num_commits,
        step=step.index,
        t=float(step.t[index]),
        tokens=step.tokens[index, first:].tolist(),
        is_masked=step.is_masked[index, first:].tolist(),
        confidence=step.confidence[index, first:].tolist(),
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
