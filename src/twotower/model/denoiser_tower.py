"""The denoiser tower: layers over noisy blocks, reading the context tower's state."""

from collections.abc import Sequence

from torch import Tensor

from twotower.config import TowerConfig
from twotower.layers.adaln import Modulation
from twotower.layers.attention import KV, Attention
from twotower.layers.mamba2 import Mamba2, MambaState
from twotower.model.layer import Layer
from twotower.model.state import ContextView, LayerState
from twotower.model.tower import Tower


class DenoiserTower(Tower):
    """Layer j reads the context's state of layer reads[j].

    Generation, one block, is K = 1 of training, which takes all blocks at once.
    """

    def __init__(self, config: TowerConfig, reads: Sequence[int], bidirectional: bool) -> None:
        """bidirectional: Mamba layers also scan the block from its end."""
        super().__init__(config)
        self.reads, self._bidirectional = tuple(reads), bidirectional

    def forward(
        self,
        blocks: Tensor,
        view: ContextView,
        mask: Tensor | None,
        modulations: list[Modulation] | None,
    ) -> Tensor:
        """blocks (B, K, T) of ids, masked or not -> hidden (B, K, T, D), normed.

        mask broadcastable to (B, Hq, K*T, S + K*T), or None: every block sees all keys.
        """
        h = self.embed(blocks)
        for index, layer in enumerate(self.each_layer()):
            modulation = None if modulations is None else modulations[index]
            u = layer.pre_norm(h, modulation)
            y = _mix(layer, u, view.layers[self.reads[index]], mask, self._bidirectional)
            h = layer.add_residual(h, y, modulation)
        return self.finish(h)


def _mix(
    layer: Layer, u: Tensor, state: LayerState, mask: Tensor | None, bidirectional: bool
) -> Tensor:
    """One mixer over u (B, K, T, D), same shape back.

    Mamba takes each block by itself, attention all blocks with shared keys.
    """
    y: Tensor
    mixer = layer.mixer
    if isinstance(mixer, Mamba2):
        assert isinstance(state, MambaState)
        seed = MambaState(state.conv.flatten(0, 1), state.ssm.flatten(0, 1))
        y = _scan(mixer, u.flatten(0, 1), seed, bidirectional)
    elif isinstance(mixer, Attention):
        assert isinstance(state, KV)
        y, _ = mixer(u.flatten(1, 2), state, mask)
    else:
        y = mixer(u)
    return y.view(u.shape)


def _scan(mixer: Mamba2, u: Tensor, seed: MambaState, bidirectional: bool) -> Tensor:
    """u (B*K, T, D) from its seed; if bidirectional, the mean with a scan from the block's end.

    That one starts from zeros: nothing is known behind the block. Source: system.md section 5.
    """
    length = u.shape[1]
    forward: Tensor
    backward: Tensor
    forward, _ = mixer(u, seed, None, None)  # no state after a noisy block is of use
    if not bidirectional:
        return forward
    backward, _ = mixer(u.flip(1), None, None, length)
    return (forward + backward.flip(1)) / 2
