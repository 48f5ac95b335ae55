"""Training losses of the denoiser: cross-entropy of the clean token at the same position.

Decides which terms are added up; which tokens are masked comes from noise.corrupt.
"""

import torch.nn.functional as F
from torch import Tensor

from twotower.diffusion.noise import Schedule, alpha, alpha_prime


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each target: logits (B, L, V), targets (B, L).

    Returns (B, L) float32. Shared by the masked loss, the next-token loss and likelihoods.
    """
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return flat.view_as(targets)


def masked_loss_sum(
    logits: Tensor, targets: Tensor, is_masked: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Sum of the cross-entropy over the masked positions: a float32 scalar, 0 if none is masked.

    logits (B, L, V); targets, is_masked (B, L). With weight (B,) or (B, L), usually elbo_weight,
    each term is multiplied by it. Who divides knows all rows of a step: the plain mean is one over
    masked tokens, the diffusion bound one over all (over masked ones the 1/t would count twice).
    """
    losses = token_cross_entropy(logits, targets).masked_fill(~is_masked, 0.0)
    if weight is None:
        return losses.sum()
    per_token = weight[:, None] if weight.ndim == 1 else weight
    return (losses * per_token).sum()


def elbo_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """Weight of a masked token in the diffusion bound at time t > 0; 1/t for "linear"."""
    return alpha_prime(schedule, t) / (1.0 - alpha(schedule, t))
