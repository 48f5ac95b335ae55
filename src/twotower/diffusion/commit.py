"""Commit rules: how many and which masked positions to fix in a denoising step.

Pure functions of one step, vectorised over rows. What is not committed returns to the
mask token; denoise_block applies the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.diffusion.noise import alpha, grid_time
from twotower.diffusion.sampling import Remask, Sampler, SamplerKind, uniform

ADAPTIVE_START = 0.4  # fraction of the steps during which the adaptive rule commits one token


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


def count_accepted(drafts: Tensor, choices: Tensor, lengths: Tensor) -> Tensor:
    """How many tokens of drafts (B, n) stand: the first, and each that the choice before it equals.

    choices (B, n): the AR tower's token after each; lengths (B,): how much of a row's draft counts.
    Returns (B,), none above its length.
    """
    is_right = drafts[:, 1:] == choices[:, :-1]
    right = is_right.long().cumprod(1).sum(1) + 1
    return torch.minimum(right, lengths)


def count_scheduled(num_masked: Tensor, keep_masked: Tensor) -> Tensor:
    """Commits per row so that at most keep_masked (B,) float positions, rounded down, stay.

    At least one is committed where num_masked (B,) > 0, however little the schedule moves.
    """
    stay = torch.minimum(keep_masked.floor().long(), num_masked - 1).clamp(min=0)
    return num_masked - stay


def count_adaptive(num_masked: Tensor, step: int, steps: Tensor) -> Tensor:
    """One commit per row early on, then an equal share of the rest; steps (B,), step from 0."""
    share = fair_share(num_masked, steps - step)
    is_early = (step / steps.double() < ADAPTIVE_START) & (steps - step > 1)
    return torch.where(is_early, num_masked.clamp(max=1), share)


def fair_share(num_masked: Tensor, steps_left: Tensor) -> Tensor:
    """ceil(num_masked / steps_left) in integers (B,)."""
    return -(-num_masked // steps_left)


def posterior_commit_probability(alpha_t: Tensor, alpha_next: Tensor) -> Tensor:
    """Probability that a token masked at retention alpha_t is unmasked at alpha_next.

    The reverse posterior factorises: token v appears with this probability times p(v),
    and the position stays masked with the rest. Any broadcastable shapes.
    """
    return (alpha_next - alpha_t) / (1.0 - alpha_t)


def top2_margin(probs: Tensor) -> Tensor:
    """Largest minus second largest probability over the last axis: (..., V) -> (...)."""
    top = probs.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the R rows of one step predict, before any of it is committed."""

    step: int  # from 0
    generators: Sequence[torch.Generator]  # R, or none if nothing is random
    is_masked: Tensor  # (R, T)
    probs: Tensor  # (R, T, V) unscaled, 0 for the mask token
    tokens: Tensor  # (R, T)
    confidence: Tensor  # (R, T) probs of tokens
    is_last: bool = False  # no row has another pass


def choose_commits(sampler: Sampler, found: Predictions) -> Tensor:
    """The masked positions that take their predicted token in this step: bool (R, T)."""
    return _RULES[sampler.kind](sampler, found)


def _commit_confident(sampler: Sampler, found: Predictions) -> Tensor:
    if found.is_last:
        return found.is_masked
    steps_left = sampler.steps - found.step
    counts = count_confident(found.confidence, found.is_masked, sampler.threshold, steps_left)
    return select_commits(found.confidence, found.is_masked, counts)


def _commit_remasked(sampler: Sampler, found: Predictions) -> Tensor:
    """Commit all but what the schedule, or the adaptive rule, returns to the mask token."""
    num_masked = found.is_masked.sum(-1)
    if sampler.adaptive:
        counts = count_adaptive(num_masked, found.step, sampler.steps)
    else:
        t_next = grid_time(found.step + 1, sampler.steps)
        keep = (1.0 - alpha(sampler.schedule, t_next)) * found.is_masked.shape[-1]
        counts = count_scheduled(num_masked, keep)  # at the end of the grid keep rounds to 0
    return select_commits(_REMASK_SCORES[sampler.remask](found), found.is_masked, counts)


def _commit_posterior(sampler: Sampler, found: Predictions) -> Tensor:
    """Commit each position by itself: drawn at temperature > 0, else the likelier outcome."""
    is_last = sampler.steps == found.step + 1
    alpha_t = alpha(sampler.schedule, grid_time(found.step, sampler.steps))
    alpha_next = alpha(sampler.schedule, grid_time(found.step + 1, sampler.steps))
    # the last step ends at MIN_T, where a token could stay masked with a probability of 1e-5
    alpha_next = alpha_next.masked_fill(is_last, 1.0)
    chance = posterior_commit_probability(alpha_t, alpha_next)[:, None]  # (R, 1)
    # NaN compares false: without is_last no end
    likelier = (found.confidence * chance > 1.0 - chance) | is_last[:, None]
    if not found.generators:
        return found.is_masked & likelier
    drawn = uniform(found.is_masked.shape[-1:], found.generators).to(chance.device) < chance
    is_sampled = sampler.temperature.to(chance.device)[:, None] > 0
    return found.is_masked & torch.where(is_sampled, drawn, likelier)


def _random_scores(found: Predictions) -> Tensor:
    return uniform(found.is_masked.shape[-1:], found.generators).to(found.probs.device)


_RULES: dict[SamplerKind, Callable[[Sampler, Predictions], Tensor]] = {
    "confidence": _commit_confident,
    "predict-and-noise": _commit_remasked,
    "posterior": _commit_posterior,
}
_REMASK_SCORES: dict[Remask, Callable[[Predictions], Tensor]] = {
    "confidence": lambda found: found.confidence,
    "margin": lambda found: top2_margin(found.probs),
    "random": _random_scores,
}
