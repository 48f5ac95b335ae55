"""Drafts of the denoiser tower: all masked positions of a block at once."""

from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twotower.engine.batch import Batch
from twotower.engine.denoiser import fill_blocks
from twotower.engine.drafts import DraftController, Proposal
from twotower.engine.events import Event
from twotower.engine.request import Row

# A draft is verified as far as its predictions are all right with at least this probability, by the
# denoiser's own account.
LEAST_CHANCE = 0.05
_WEIGHT, _PAUSES = 0.5, (24, 96)  # one very bad draft leads to a pause


def propose(row: Row, batch: Batch, known: Sequence[int], room: int) -> Proposal | None:
    """A draft that is yet to be written, by `write`."""
    if row.options.drafts == "lookup" or not batch.model.has_denoiser:
        return None
    if "denoiser" not in row.controllers:
        cost = draft_cost(batch, row.options.draft_passes)
        row.controllers["denoiser"] = DraftController(cost, _WEIGHT, _PAUSES)
    return Proposal("denoiser", row.controllers["denoiser"])


def draft_cost(batch: Batch, num_passes: int) -> float:
    """AR steps that a draft and its verification cost: a layer of either tower costs as much."""
    config = batch.model.config
    share = config.denoiser.num_layers / config.context.num_layers
    return batch.model.verify_cost * (1 + num_passes * share)


def write(batch: Batch, blocks: Tensor, places: Tensor) -> Generator[Event, None, Tensor]:
    """Fill the masks of blocks (B, T) at places (R,); returns how much of each to verify (R,)."""
    # Greedy, because the context tower has the last word anyway.
    sampler = replace(batch.sampler, temperature=torch.zeros(len(batch.rows))).select(places)
    last = yield from fill_blocks(batch, blocks[places], sampler, places, num_known=1)
    # Not the first column: AR may have chosen the mask token, which the denoiser then fills.
    blocks[places, 1:] = last.tokens[:, 1:].cpu()
    return draft_lengths(last.confidence.cpu())


def draft_lengths(confidence: Tensor) -> Tensor:
    """How much of each draft to verify: confidence (B, n) -> (B,), at least 2, at most n."""
    return (confidence.cumprod(1) >= LEAST_CHANCE).sum(1).clamp(min=2)
