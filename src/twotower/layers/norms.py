"""Root-mean-square norms with a learned weight: float32 inside."""

import torch
from torch import Tensor, nn

from twotower.kernels.mixing import TORCH, Added, Modulation


class RMSNorm(nn.Module):
    """x / rms(x) * weight; of the residual stream behind the addition to it of the mixer before."""

    kernels = TORCH

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(
        self,
        h: Tensor,
        added: Added | None = None,
        modulation: Modulation | None = None,
        is_before: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`mixing.add_norm`: the stream, and its norm in the weight's dtype."""
        return self.kernels.add_norm(h, added, self.weight, self.eps, modulation, is_before)


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
