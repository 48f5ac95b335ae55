"""Masked diffusion as pure functions on tensors: noise, losses, token choice, the block loop."""

from twotower.diffusion.chance import draw_noise, filter_logits, gumbel
from twotower.diffusion.commit import Predictions, commit_confident
from twotower.diffusion.denoise_block import Denoise, Step, denoise_block
from twotower.diffusion.loss import elbo_weight, masked_loss_sum, token_cross_entropy
from twotower.diffusion.noise import SCHEDULES, Schedule, alpha, alpha_prime, corrupt
from twotower.diffusion.ranking import Rank, most_probable
from twotower.diffusion.sampler import PER_ROW, Remask, Sampler, SamplerKind
from twotower.diffusion.sampling import NOT_FINITE, argmax, ban, choose, require_finite, sample

__all__ = [
    "NOT_FINITE",
    "PER_ROW",
    "SCHEDULES",
    "Denoise",
    "Predictions",
    "Rank",
    "Remask",
    "Sampler",
    "SamplerKind",
    "Schedule",
    "Step",
    "alpha",
    "alpha_prime",
    "argmax",
    "ban",
    "choose",
    "commit_confident",
    "corrupt",
    "denoise_block",
    "draw_noise",
    "elbo_weight",
    "filter_logits",
    "gumbel",
    "masked_loss_sum",
    "most_probable",
    "require_finite",
    "sample",
    "token_cross_entropy",
]
