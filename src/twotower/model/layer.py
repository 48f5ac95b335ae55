"""One layer of a tower: residual, norm, mixer, and where adaLN stands in between."""

from torch import Tensor, nn

from twotower.config import TowerConfig
from twotower.kernels.mixing import Added
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
    """h + gate * mixer(norm(h)); a tower calls `pre_norm` and the mixer, whose output the next
    layer's `pre_norm` adds, or the tower's end: on a GPU that is one launch.
    """

    def __init__(self, spec: LayerSpec, config: TowerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = make_mixer(spec, config.hidden_size, config.norm_eps)

    def matrices(self) -> list[nn.Module]:
        """The modules that hold the mixer's large weights: linear maps and stacks of experts."""
        return [part for part in self.mixer.modules() if isinstance(part, nn.Linear | Experts)]

    def pre_norm(
        self, h: Tensor, added: Added | None = None, modulation: Modulation | None = None
    ) -> tuple[Tensor, Tensor]:
        """The residual (..., D) with the mixer's output and gate of the layer before, in its dtype;
        and the mixer's input in the weights' dtype.

        Mamba and attention modulate, then norm; MoE and MLP norm, then modulate: a fact of the
        released weights (system.md section 3, 'Order').
        """
        by = None if modulation is None else (modulation.shift, modulation.scale)
        is_before = isinstance(self.mixer, Mamba2 | Attention)
        found: tuple[Tensor, Tensor] = self.norm(h, added, by, is_before)
        return found
