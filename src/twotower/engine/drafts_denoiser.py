"""Drafts of the denoiser tower: all masked positions of a block at once."""

import math
from collections.abc import Generator, Sequence

from torch import Tensor

from twotower.engine.batch import Batch
from twotower.engine.denoiser import fill_blocks
from twotower.engine.drafts import DraftController, Proposal
from twotower.engine.drafts_lookup import Candidates
from twotower.engine.events import Event
from twotower.engine.request import Row

_WEIGHT, _PAUSES = 0.25, (24, 96)
# AR steps of one row that drafts take beside their passes: those of a batch together, and each.
_TOGETHER, _EACH = 0.1, 0.1


def propose(row: Row, batch: Batch, known: Sequence[int]) -> Proposal | None:
    """A draft that is yet to be written, by `write`; None where drafts have not paid of late."""
    if row.options.drafts == "lookup" or not batch.model.has_denoiser:
        return None
    if len(known) > row.options.block_size - 2 or row.num_left < 2:
        return None  # no position is left to fill
    if row.controller is None:
        row.controller = DraftController(_WEIGHT, _PAUSES)
    if not row.controller.is_drafting:
        return None
    # The first comes before all others: lookups that give two tokens would keep a denoiser that
    # gives ten from being tried.
    return Proposal("denoiser", row.controller.gain if row.controller.num_drafts > 0 else math.inf)


def writing_cost(row: Row, batch: Batch, num_writers: int) -> float:
    """AR steps that a draft takes, if as many rows write: the others wait for them, at the writers'
    expense. A layer of either tower costs as much.
    """
    config, options = batch.model.config, row.options
    share = config.denoiser.num_layers / config.context.num_layers
    passes = options.draft_passes * share * batch.pass_cost(options.block_size, num_writers)
    shared = passes + _TOGETHER * batch.pass_cost(1, num_rows=1)
    return _EACH + shared * len(batch.rows) / num_writers


def write(
    batch: Batch, blocks: Tensor, indices: Tensor
) -> Generator[Event, None, list[list[Candidates]]]:
    """Fill the masks of blocks (R, T) of the rows `indices` (R,): each one's tokens and how sure
    the denoiser is of them, given those before; 1 for what was known. Behind a token stand the next
    most probable ones, where drafts may branch.
    """
    sampler = batch.draft_sampler
    if len(indices) < len(batch.rows):
        sampler = sampler.select(indices)
    last = yield from fill_blocks(batch, blocks, sampler, indices, num_known=1)
    written: list[list[Candidates]] = [
        [[own] for own in zip(tokens, sure, strict=True)]
        for tokens, sure in zip(last.tokens.tolist(), last.confidence.tolist(), strict=True)
    ]
    if last.others is not None:
        for row, *others in zip(last.rows.tolist(), *map(Tensor.tolist, last.others), strict=True):
            each = zip(written[row], *others, strict=True)
            # What was no mask any more in the last pass has others of probability 0.
            written[row] = [
                [*own, *(other for other in zip(*more, strict=True) if other[1] > 0)]
                for own, *more in each
            ]
    return written
