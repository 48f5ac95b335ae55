"""Which masked positions to fix in a denoising step: by a noise schedule.

The rules of predict-and-noise, which commits all predictions and masks some again, and of the
posterior, which draws for each position whether it is unmasked. Source: system.md section 4.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twotower.diffusion.commit import Predictions, fair_share, select_commits
from twotower.diffusion.noise import alpha, grid_time
from twotower.diffusion.sampler import Remask, Sampler

ADAPTIVE_START = 0.4  # fraction of the steps during which the adaptive rule commits one token


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


def commit_remasked(sampler: Sampler, found: Predictions) -> Tensor:
    """Commit all but what the schedule, or the adaptive rule, returns to the mask token."""
    num_masked = found.is_masked.sum(-1)
    if sampler.adaptive:
        counts = count_adaptive(num_masked, found.step, sampler.steps)
    else:
        t_next = grid_time(found.step + 1, sampler.steps)
        keep = (1.0 - alpha(sampler.schedule, t_next)) * found.is_masked.shape[-1]
        counts = count_scheduled(num_masked, keep)  # at the end of the grid keep rounds to 0
    return select_commits(_REMASK_SCORES[sampler.remask](found), found.is_masked, counts)


def commit_posterior(sampler: Sampler, found: Predictions) -> Tensor:
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
    return uniform(found.is_masked.shape[-1:], found.generators).to(found.logits.device)


_REMASK_SCORES: dict[Remask, Callable[[Predictions], Tensor]] = {
    "confidence": lambda found: found.confidence,
    "margin": lambda found: top2_margin(found.logits.softmax(-1)),
    "random": _random_scores,
}


def uniform(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform [0, 1) noise (len(generators), *shape), float32 on CPU, one generator per row."""
    return torch.stack([torch.rand(*shape, generator=generator) for generator in generators])
