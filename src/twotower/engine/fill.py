"""Denoiser passes over one block of several rows, told as events."""

from collections.abc import Generator, Sequence

from torch import Tensor

from twotower.diffusion import BlockSampler, Step
from twotower.engine.events import Event, StepTaken
from twotower.engine.row import Row
from twotower.engine.seat import Seat


def fill_blocks(
    seat: Seat,
    rows: Sequence[Row],
    blocks: Tensor,
    samplers: Sequence[BlockSampler],
    places: Tensor | None = None,
    num_known: int = 0,
) -> Generator[Event, None, Step]:
    """Fill the masked positions of blocks (R, T), at least one a row; returns the last step.

    places (R,): where the rows are in the seat, None for all. The first `num_known` tokens of a
    block are text already: events leave them out.
    """
    generators = [row.generator for row in rows]
    before = [row.nfe for row in rows]
    last: Step | None = None
    for last in seat.fill(places, blocks, samplers, generators):
        for index in last.t.nonzero().flatten().tolist():  # also rows that reuse their last pass
            rows[index].nfe = before[index] + int(last.nfe[index])
            if not rows[index].is_filtered:  # its filters have not seen these tokens
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
