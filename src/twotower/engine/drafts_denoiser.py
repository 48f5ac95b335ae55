"""Drafts of the denoiser tower: all masked positions of a block at once."""

import math
from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twotower.diffusion import Sampler
from twotower.engine.batch import Batch
from twotower.engine.denoiser import fill_blocks
from twotower.engine.drafts import DraftController, Proposal
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
        return None  # no place is left to fill
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
    batch: Batch, blocks: Tensor, places: Tensor
) -> Generator[Event, None, list[list[tuple[int, float]]]]:
    """Fill the masks of blocks (B, T) at places (R,): each one's tokens and how sure the denoiser
    is of them, given those before; 1 for what was known.
    """
    sampler = _greedy(batch)
    if len(places) < len(batch.rows):
        sampler = sampler.select(places)
    last = yield from fill_blocks(batch, blocks[places], sampler, places, num_known=1)
    each = zip(last.tokens.tolist(), last.confidence.tolist(), strict=True)
    return [list(zip(tokens, sure, strict=True)) for tokens, sure in each]


def _greedy(batch: Batch) -> Sampler:
    """The rows' sampler without chance: the context tower has the last word anyway."""
    sampler = batch.sampler
    if sampler.is_greedy:
        return sampler
    return replace(sampler, temperature=torch.zeros(len(batch.rows)))
