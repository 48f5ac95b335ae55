"""Drafts of the denoiser tower: all masked positions of a block at once."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from twotower.diffusion import Sampler
from twotower.engine.batch import Batch
from twotower.engine.denoiser import fill_blocks
from twotower.engine.drafts import DraftController, Proposal, pass_cost
from twotower.engine.events import Event
from twotower.engine.request import Row

_WEIGHT, _PAUSES = 0.5, (24, 96)  # one very bad draft leads to a pause


def propose(row: Row, batch: Batch, known: Sequence[int], room: int) -> Proposal | None:
    """A draft that is yet to be written, by `write`."""
    if row.options.drafts == "lookup" or not batch.model.has_denoiser:
        return None
    if "denoiser" not in row.controllers:
        row.controllers["denoiser"] = DraftController(_WEIGHT, _PAUSES)
    return Proposal("denoiser", row.controllers["denoiser"], cost=writing_cost(row, batch))


def writing_cost(row: Row, batch: Batch) -> float:
    """AR steps that the passes of a draft take: a layer of either tower costs as much."""
    config, options = batch.model.config, row.options
    share = config.denoiser.num_layers / config.context.num_layers
    return options.draft_passes * share * pass_cost(batch.model.pass_costs, options.block_size)


def write(batch: Batch, blocks: Tensor, places: Tensor) -> Generator[Event, None, Tensor]:
    """Fill the masks of blocks (B, T) at places (R,); returns how much of each to verify (R,)."""
    sampler = _greedy(batch)
    if len(places) < len(batch.rows):
        sampler = sampler.select(places)
    last = yield from fill_blocks(batch, blocks[places], sampler, places, num_known=1)
    # Not the first column: AR may have chosen the mask token, which the denoiser then fills.
    blocks[places, 1:] = last.tokens[:, 1:].cpu()
    rows = [batch.rows[place] for place in places.tolist()]
    writing = torch.tensor([row.proposal.cost for row in rows if row.proposal is not None])
    return draft_lengths(last.confidence.cpu(), batch.model.pass_costs, writing)


def _greedy(batch: Batch) -> Sampler:
    """The rows' sampler without chance: the context tower has the last word anyway."""
    sampler = batch.sampler
    if sampler.is_greedy:
        return sampler
    return replace(sampler, temperature=torch.zeros(len(batch.rows)))


@lru_cache(maxsize=64)
def _passes(costs: tuple[tuple[int, float], ...], most: int) -> Tensor:
    """What passes over 2 to `most` tokens cost."""
    return torch.tensor([pass_cost(dict(costs), n) for n in range(2, most + 1)])


def draft_lengths(confidence: Tensor, costs: Mapping[int, float], writing: Tensor) -> Tensor:
    """How much of each draft to verify, (B,), at least 2: where the expected gain is largest.

    confidence (B, n): the denoiser's own account of how probable each token is, given those before;
    writing (B,): AR steps that the draft took; costs: of passes.
    """
    expected = confidence.cumprod(1).cumsum(1)[:, 1:]
    passes = _passes(tuple(costs.items()), confidence.shape[1])
    return (expected / (passes + writing.unsqueeze(1))).argmax(1) + 2
