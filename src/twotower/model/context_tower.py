"""The context tower: the causal backbone. It alone writes state."""

import torch
from torch import Tensor, nn

from twotower import masks
from twotower.config import ModelConfig
from twotower.layers.attention import KV, Attention
from twotower.layers.mamba2 import Mamba2, MambaState
from twotower.layers.norms import RMSNorm
from twotower.model.layer import Layer
from twotower.model.state import ContextCache, LayerState


class ContextTower(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(kind, config) for kind in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(
        self,
        ids: Tensor,
        past: tuple[LayerState, ...] | None,
        mask: Tensor | None,
        counts: Tensor | None,
        states_every: int,
    ) -> tuple[Tensor, list[LayerState]]:
        """ids (B, L) after a past -> hidden (B, L, D), normed, and each layer's new state.

        past and new state: KV of S or L tokens, MambaState with leading (B,) or (B, L/states_every).
        """
        h = embed(self.embeddings, ids, self.config)
        states: list[LayerState] = []
        for index, layer in enumerate(self.layers):
            u = layer.enter(h)
            before = None if past is None else past[index]
            state: LayerState = None
            if isinstance(layer.mixer, Mamba2):
                assert before is None or isinstance(before, MambaState)
                y, state = layer.mixer(u, before, counts, states_every)
            elif isinstance(layer.mixer, Attention):
                assert before is None or isinstance(before, KV)
                y, state = layer.mixer(u, before, mask)
            else:
                y = layer.mixer(u)
            h = layer.leave(h, y)
            states.append(state)
        return self.norm_f(h.to(self.norm_f.weight.dtype)), states

    def extend(self, cache: ContextCache, ids: Tensor, counts: Tensor | None) -> Tensor:
        """Read ids (B, L) after the cache and commit them; counts (B,) valid tokens per row, None for all.

        Returns hidden (B, L, D), normed.
        """
        num_rows, length = ids.shape
        if cache.is_uniform:
            mask = masks.causal(length, cache.num_past, ids.device)
        else:
            mask = masks.causal_rows(length, cache.lengths.to(ids.device), cache.num_past)
        on_device = None if counts is None else counts.to(ids.device)
        hidden, states = self(ids, cache.layers, mask, on_device, length)
        cache.append(
            states, hidden, torch.full((num_rows,), length) if counts is None else counts.cpu()
        )
        return hidden


def embed(embeddings: nn.Module, ids: Tensor, config: ModelConfig) -> Tensor:
    """ids (...) -> the residual stream (..., D); float32 when the configuration keeps it so."""
    h: Tensor = embeddings(ids)
    return h.float() if config.residual_in_fp32 else h
