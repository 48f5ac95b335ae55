"""Root-mean-square norms with a learned weight."""

import torch
from torch import Tensor, nn

from twotower.kernels.mixing import TORCH, Modulation


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32; keeps x's dtype."""

    kernels = TORCH

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(
        self, x: Tensor, modulation: Modulation | None = None, is_before: bool = False
    ) -> Tensor:
        """With a modulation (shift, scale), that is done before or behind the norm."""
        return self.kernels.rms_norm(x, self.weight, self.eps, modulation, is_before)


class GatedRMSNorm(nn.Module):
    """The norm at the end of a Mamba-2 mixer: y * silu(gate), normed per group of channels."""

    kernels = TORCH

    def __init__(self, width: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.num_groups = num_groups
        self.eps = eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.kernels.gated_rms_norm(y, gate, self.weight, self.num_groups, self.eps)
