"""Noise schedules and the forward (masking) process.

Decides how much of a token survives at time t in [0, 1] (1 = all masked). When t is
drawn, and what the model does with it, is left to training and to denoise_block.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal["linear", "cosine", "exponential"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

MIN_T = 1e-5  # end of the sampling grid
_RATE = 3.0  # decay rate of the exponential schedule
_FLOOR = math.exp(-_RATE)  # its value at t = 1 before rescaling to [0, 1]


def alpha(schedule: Schedule, t: Tensor) -> Tensor:
    """Retention: the probability that a token is still unmasked at time t.

    t of any shape in [0, 1]; computed in t's dtype, 1 at t = 0 and 0 at t = 1.
    """
    if schedule == "linear":
        return 1.0 - t
    if schedule == "cosine":
        return torch.cos(t * (math.pi / 2))
    if schedule == "exponential":
        return (torch.exp(-_RATE * t) - _FLOOR) / (1.0 - _FLOOR)
    raise _unknown(schedule)


def alpha_prime(schedule: Schedule, t: Tensor) -> Tensor:
    """Speed of masking, -d alpha / dt: non-negative, same shape and dtype as t."""
    if schedule == "linear":
        return torch.ones_like(t)
    if schedule == "cosine":
        return torch.sin(t * (math.pi / 2)) * (math.pi / 2)
    if schedule == "exponential":
        return _RATE * torch.exp(-_RATE * t) / (1.0 - _FLOOR)
    raise _unknown(schedule)


def grid_time(step: int, steps: Tensor) -> Tensor:
    """Time before step k = 0..steps of each row's uniform grid from 1 to MIN_T: (B,) float64."""
    return 1.0 - step * (1.0 - MIN_T) / steps.double()


def _unknown(schedule: str) -> ValueError:
    return ValueError(f"schedule = {schedule!r}: choose one of {', '.join(SCHEDULES)}")


def corrupt(
    tokens: Tensor,
    t: Tensor,
    mask_token_id: int,
    uniform: Tensor,
    loss_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace each token of (B, L) by the mask token with probability t, independently.

    t (B,), or anything that broadcasts to (B, L), is the masking probability 1 - alpha; uniform
    (B, L) random numbers in [0, 1). loss_mask (B, L) bool limits masking to its true positions.
    Returns the noisy tokens and is_masked, both (B, L).
    """
    per_token = t[:, None] if t.ndim == 1 else t
    is_masked = uniform < per_token
    if loss_mask is not None:
        is_masked = is_masked & loss_mask
    return tokens.masked_fill(is_masked, mask_token_id), is_masked
