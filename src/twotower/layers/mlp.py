"""The dense MLP: down_proj(relu(up_proj(x))^2)."""

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Squared-ReLU MLP, (..., D) -> (..., D)."""

    def __init__(self, width: int, inner_width: int, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner_width, bias=bias)
        self.down_proj = nn.Linear(inner_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.relu(self.up_proj(x)).square())
        return y
