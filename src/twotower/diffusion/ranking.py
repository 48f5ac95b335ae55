"""The most probable tokens of each position."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twotower.diffusion.sampling import argmax, ban

# logits, count, unused_ids, chosen -> ids, probs: `most_probable`, or a backend's own
Rank = Callable[[Tensor, int, Sequence[int], Tensor | None], tuple[Tensor, Tensor]]


def most_probable(
    logits: Tensor, count: int = 1, unused_ids: Sequence[int] = (), chosen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The most probable tokens of each position, the best first, the lower id at a tie: ids and
    probs (..., count) of the softmax of logits (..., V) float32; fewer where V is smaller.

    chosen (...): the first ones, where something else than the logits chose them. unused_ids: of
    the vocabulary, that are no token; those behind the first may be of them if V has few others.
    """
    best = argmax(ban(logits, unused_ids)) if chosen is None else chosen
    best, probs = best.unsqueeze(-1), logits.softmax(-1)
    if (count := min(count, logits.shape[-1])) == 1:
        return best, probs.gather(-1, best)
    ids = ban(probs, unused_ids).topk(count).indices
    # The best one, then the others in their order: it may stand elsewhere at a tie, or be missing.
    order = (ids == best).byte().argsort(dim=-1, stable=True)[..., : count - 1]
    ids = torch.cat([best, ids.gather(-1, order)], -1)
    return ids, probs.gather(-1, ids)
