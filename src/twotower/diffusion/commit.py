"""Which masked positions to fix in a denoising step: by confidence.

Pure functions of one step, vectorised over rows, as in `scheduled`, which has the rules that follow
a noise schedule. What is not committed returns to the mask token; denoise_block applies the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.diffusion.sampler import Sampler


def select_commits(scores: Tensor, is_masked: Tensor, counts: Tensor) -> Tensor:
    """The counts (B,) masked positions with the largest scores (B, T), as bool (B, T).

    A tie goes to the earlier position; positions that are not masked are never selected.
    """
    # the sort must be stable: quantised logits tie exactly, and torch's default order is arbitrary
    order = scores.masked_fill(~is_masked, float("-inf")).argsort(
        dim=-1, descending=True, stable=True
    )
    positions = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(-1, order, positions)
    return is_masked & (ranks < counts[:, None])


def count_confident(
    confidence: Tensor, is_masked: Tensor, threshold: Tensor, steps_left: Tensor
) -> Tensor:
    """Commits per row: all above the threshold, and enough to finish in steps_left.

    confidence, is_masked (B, T); threshold, steps_left >= 1 (B,). Returns int64 (B,):
    at least 1 where a row has masked positions, all of them on its last step.
    """
    confident = ((confidence > threshold[:, None]) & is_masked).sum(-1)
    return torch.maximum(confident, fair_share(is_masked.sum(-1), steps_left))


def fair_share(num_masked: Tensor, steps_left: Tensor) -> Tensor:
    """ceil(num_masked / steps_left) in integers (B,)."""
    return -(-num_masked // steps_left)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the R rows of one step predict, before any of it is committed."""

    step: int  # from 0
    generators: Sequence[torch.Generator]  # R, or none if nothing is random
    is_masked: Tensor  # (R, T)
    logits: Tensor  # (R, T, V) unscaled, -inf for the mask token
    tokens: Tensor  # (R, T)
    confidence: Tensor  # (R, T) how probable the tokens are
    is_last: bool = False  # no row has another pass


def commit_confident(sampler: Sampler, found: Predictions) -> Tensor:
    """The rule of kind "confidence": what is more probable than the threshold, at least a share."""
    if found.is_last:
        return found.is_masked
    steps_left = sampler.steps - found.step
    counts = count_confident(found.confidence, found.is_masked, sampler.threshold, steps_left)
    return select_commits(found.confidence, found.is_masked, counts)
