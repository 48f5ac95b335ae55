"""The denoiser tower: the same layers over noisy blocks, reading the context tower's state."""

from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.layers.adaln import Modulation
from twotower.layers.attention import KV, Attention
from twotower.layers.mamba2 import Mamba2, MambaState
from twotower.layers.norms import RMSNorm
from twotower.model.context_tower import embed
from twotower.model.layer import Layer
from twotower.model.state import ContextView, LayerState


class DenoiserTower(nn.Module):
    """Layer i reads the context's state of layer i. One block (generation) is K = 1 of all blocks (training)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(kind, config) for kind in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

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
        h = embed(self.embeddings, blocks, self.config)
        for index, layer in enumerate(self.layers):
            modulation = None if modulations is None else modulations[index]
            u = layer.enter(h, modulation)
            h = layer.leave(h, _mix(layer, u, view.layers[index], mask), modulation)
        return self.norm_f(h.to(self.norm_f.weight.dtype))


def _mix(layer: nn.Module, u: Tensor, state: LayerState, mask: Tensor | None) -> Tensor:
    """One mixer over u (B, K, T, D): Mamba takes each block by itself, attention all blocks with shared keys."""
    mixer = layer.mixer
    if isinstance(mixer, Mamba2):
        assert isinstance(state, MambaState)
        seed = MambaState(state.conv.flatten(0, 1), state.ssm.flatten(0, 1))
        y, _ = mixer(u.flatten(0, 1), seed, None, u.shape[2])
    elif isinstance(mixer, Attention):
        assert isinstance(state, KV)
        y, _ = mixer(u.flatten(1, 2), state, mask)
    else:
        assert isinstance(mixer, nn.Module)
        y = mixer(u)
    return y.view(u.shape)
