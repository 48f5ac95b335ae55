"""The dense MLPs: down_proj(relu(up_proj(x))^2), and down_proj(silu(gate_proj(x)) * up_proj(x))."""

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Squared-ReLU MLP, or a SiLU-gated one; (..., D) -> (..., D)."""

    def __init__(self, width: int, inner_width: int, bias: bool, gated: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner_width, bias=bias) if gated else None
        self.up_proj = nn.Linear(width, inner_width, bias=bias)
        self.down_proj = nn.Linear(inner_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up_proj(x)
        if self.gate_proj is None:
            inner = F.relu(inner).square()
        else:
            inner = F.silu(self.gate_proj(x)) * inner
        y: Tensor = self.down_proj(inner)
        return y
