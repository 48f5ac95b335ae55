"""One layer of a tower: norm, mixer, residual, and where adaLN stands in between."""

from torch import Tensor, nn

from twotower.config import ATTENTION, MAMBA, MOE, ModelConfig
from twotower.layers.adaln import Modulation
from twotower.layers.attention import Attention
from twotower.layers.mamba2 import Mamba2
from twotower.layers.mlp import MLP
from twotower.layers.moe import Experts, MoE
from twotower.layers.norms import RMSNorm


def make_mixer(kind: str, config: ModelConfig) -> Mamba2 | Attention | MoE | MLP:
    """The mixer for a symbol of the layer pattern."""
    if kind == MAMBA:
        return Mamba2(config)
    if kind == ATTENTION:
        return Attention(config)
    if kind == MOE:
        return MoE(config)
    return MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)


class Layer(nn.Module):
    """h + gate * mixer(norm(h)); a tower calls `pre_norm`, the mixer, then `add_residual`."""

    def __init__(self, kind: str, config: ModelConfig) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = make_mixer(kind, config)

    def matrices(self) -> list[nn.Module]:
        """The modules that hold the mixer's large weights: linear maps and stacks of experts."""
        return [part for part in self.mixer.modules() if isinstance(part, nn.Linear | Experts)]

    def pre_norm(self, h: Tensor, modulation: Modulation | None = None) -> Tensor:
        """The mixer's input (..., D) in the weights' dtype.

        Mamba and attention modulate, then norm; MoE and MLP norm, then modulate: a fact of the
        released weights (system.md section 3, 'Order').
        """
        h = h.to(self.norm.weight.dtype)
        modulates_first = self.kind in (MAMBA, ATTENTION)
        if modulation is not None and modulates_first:
            h = h * (1 + modulation.scale) + modulation.shift
        u: Tensor = self.norm(h)
        if modulation is None or modulates_first:
            return u
        return u * (1 + modulation.scale) + modulation.shift

    def add_residual(self, h: Tensor, y: Tensor, modulation: Modulation | None = None) -> Tensor:
        """The residual: h (..., D) plus the mixer's output, gated if modulated; keeps h's dtype."""
        return h + (y if modulation is None else modulation.gate * y).to(h.dtype)
