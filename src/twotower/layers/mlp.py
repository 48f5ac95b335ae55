"""The dense MLPs: down_proj(relu(up_proj(x))^2), and down_proj(silu(gate_proj(x)) * up_proj(x))."""

from torch import Tensor, nn

from twotower.kernels.expert_products import activation


class MLP(nn.Module):
    """Squared-ReLU MLP, or a SiLU-gated one; (..., D) -> (..., D)."""

    def __init__(self, width: int, inner_width: int, bias: bool, gated: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner_width, bias=bias) if gated else None
        self.up_proj = nn.Linear(width, inner_width, bias=bias)
        self.down_proj = nn.Linear(inner_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.gate_proj is None else self.gate_proj(x)
        y: Tensor = self.down_proj(activation(self.up_proj(x), gate))
        return y
