"""Time conditioning by one vector and a table per layer (adaLN-single).

Source: system.md section 3.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

NUM_FEATURES = 256


class Modulation(NamedTuple):
    """What adaLN does to one layer: each broadcasts against the hidden states (B, K, T, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def time_features(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Sinusoidal features of t (...,) in [0, 1]: cos and sin of 1000 t times 128 frequencies.

    Returns (..., 256), cos first. t and 1000 t are rounded to `dtype` before: in bfloat16 625
    becomes 624, and the released weights were trained so. Angles, cos and sin are float32.
    """
    half = NUM_FEATURES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    frequencies = (-math.log(10000.0) * exponent).exp()
    angles = (t.to(dtype) * 1000.0).float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class TimestepEmbedder(nn.Module):
    """t (...,) -> embedding (..., D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        embedding: Tensor = self.mlp(time_features(t, dtype))
        return embedding
