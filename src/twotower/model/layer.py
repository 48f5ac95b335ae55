"""One layer of a tower: norm, mixer, residual, and where adaLN stands in between."""

from torch import Tensor, nn

from twotower.config import TowerConfig
from twotower.layers.adaln import Modulation
from twotower.layers.attention import Attention
from twotower.layers.mamba2 import Mamba2
from twotower.layers.mlp import MLP
from twotower.layers.moe import Experts, MoE
from twotower.layers.norms import RMSNorm
from twotower.specs import AttentionSpec, LayerSpec, MambaSpec, MoESpec


def make_mixer(spec: LayerSpec, width: int, eps: float) -> Mamba2 | Attention | MoE | MLP:
    """The mixer that a layer's sizes describe, in a tower of `width`."""
    if isinstance(spec, MambaSpec):
        return Mamba2(width, spec, eps)
    if isinstance(spec, AttentionSpec):
        return Attention(width, spec, eps)
    if isinstance(spec, MoESpec):
        return MoE(width, spec)
    return MLP(width, spec.intermediate_size, spec.bias, spec.gated)


class Layer(nn.Module):
    """h + gate * mixer(norm(h)); a tower calls `pre_norm`, the mixer, then `add_residual`."""

    def __init__(self, spec: LayerSpec, config: TowerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = make_mixer(spec, config.hidden_size, config.norm_eps)

    def matrices(self) -> list[nn.Module]:
        """The modules that hold the mixer's large weights: linear maps and stacks of experts."""
        return [part for part in self.mixer.modules() if isinstance(part, nn.Linear | Experts)]

    def pre_norm(self, h: Tensor, modulation: Modulation | None = None) -> Tensor:
        """The mixer's input (..., D) in the weights' dtype.

        Mamba and attention modulate, then norm; MoE and MLP norm, then modulate: a fact of the
        released weights (system.md section 3, 'Order').
        """
        added = None if modulation is None else (modulation.shift, modulation.scale)
        is_before = isinstance(self.mixer, Mamba2 | Attention)
        u: Tensor = self.norm(h.to(self.norm.weight.dtype), added, is_before)
        return u

    def add_residual(self, h: Tensor, y: Tensor, modulation: Modulation | None = None) -> Tensor:
        """The residual: h (..., D) plus the mixer's output, gated if modulated; keeps h's dtype."""
        return h + (y if modulation is None else modulation.gate * y).to(h.dtype)
