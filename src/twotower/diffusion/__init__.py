"""Masked diffusion as pure functions on tensors: noise, losses, token choice, the block loop."""

from twotower.diffusion.chance import gumbel as gumbel
from twotower.diffusion.commit import Predictions as Predictions
from twotower.diffusion.commit import commit_confident as commit_confident
from twotower.diffusion.denoise_block import Denoise as Denoise
from twotower.diffusion.denoise_block import Step as Step
from twotower.diffusion.denoise_block import denoise_block as denoise_block
from twotower.diffusion.noise import SCHEDULES as SCHEDULES
from twotower.diffusion.noise import Schedule as Schedule
from twotower.diffusion.ranking import most_probable as most_probable
from twotower.diffusion.sampler import PER_ROW as PER_ROW
from twotower.diffusion.sampler import Remask as Remask
from twotower.diffusion.sampler import Sampler as Sampler
from twotower.diffusion.sampler import SamplerKind as SamplerKind
from twotower.diffusion.sampling import NOT_FINITE as NOT_FINITE
from twotower.diffusion.sampling import argmax as argmax
from twotower.diffusion.sampling import ban as ban
from twotower.diffusion.sampling import choose as choose
from twotower.diffusion.sampling import require_finite as require_finite
from twotower.diffusion.sampling import sample as sample
