"""Rotary positions: queries and keys are turned by angles that grow with the position.

Halves, not neighbours, make a pair, as in `transformers`. Source: arXiv 2104.09864; the scaling
"llama3" is that of Llama 3.1's release, "yarn" that of arXiv 2309.00071.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.specs import RopeSpec


class Rotation(NamedTuple):
    """Cosine and sine of each angle, (B or 1, L, 1, A) float32, at positions (B or 1, L), times the
    factor of a scaling.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor


def rotation(spec: RopeSpec, head_dim: int, positions: Tensor) -> Rotation:
    """The rotation at positions (B or 1, L), whole numbers on the device it is wanted on."""
    frequencies = inverse_frequencies(spec, head_dim, positions.device)
    angles = positions.float().unsqueeze(-1) * frequencies  # (B, L, A/2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    factor = spec.attention_factor
    return Rotation(angles.cos() * factor, angles.sin() * factor, positions)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """x (B, L, H, A) turned; the result has x's dtype."""
    one, two = x.chunk(2, dim=-1)
    turned = torch.cat([-two, one], dim=-1)
    return x * by.cos.to(x.dtype) + turned * by.sin.to(x.dtype)


@cache
def inverse_frequencies(
    spec: RopeSpec, head_dim: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Angle per position of each pair: (A/2,) float32, on the device once and for all."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / spec.theta**exponents
    if spec.scaling == "none":
        return frequencies.to(device)
    if spec.scaling == "linear":
        return (frequencies / spec.factor).to(device)
    if spec.scaling == "yarn":
        stretched = 1.0 / (spec.factor * spec.theta**exponents)
        share = _yarn_ramp(spec, head_dim)  # 0: as they are, 1: stretched by the factor
        return (stretched * share + frequencies * (1 - share)).to(device)
    wavelengths = 2 * math.pi / frequencies
    low, high = spec.low_freq_factor, spec.high_freq_factor
    smooth = (spec.original_max_positions / wavelengths - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)  # 0: stretched by the factor, 1: as they are
    return ((1 - smooth) * frequencies / spec.factor + smooth * frequencies).to(device)


def _yarn_ramp(spec: RopeSpec, head_dim: int) -> Tensor:
    """How far each pair is stretched, from 0 to 1: (A/2,) float32."""
    ends = []
    for turns in (spec.beta_fast, spec.beta_slow):
        wavelength = spec.original_max_positions / turns
        ends.append(head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(spec.theta)))
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if spec.truncate else ends
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
