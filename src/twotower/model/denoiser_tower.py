"""The denoiser tower: layers over noisy blocks, reading the context tower's state."""

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.layers.adaln import Modulation
from twotower.layers.attention import KV, Attention
from twotower.layers.mamba2 import Mamba2, MambaState
from twotower.layers.rope import Rotation
from twotower.model.layer import Layer
from twotower.model.tower import Tower
from twotower.model.view import ContextView, LayerState


class DenoiserTower(Tower):
    """Layer j reads the context's state of layer reads[j].

    Generation, one block, is K = 1 of training, which takes all blocks at once.
    """

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__(config.denoiser)
        self.reads, self._bidirectional = config.reads, config.bidirectional_mamba
        width = config.hidden_size
        self.mask_embedding: nn.Parameter | None = None
        if config.has_own_mask:
            self.mask_embedding = nn.Parameter(
                torch.zeros(config.num_mask_embeddings, width).squeeze(0)
            )
        reads_hidden = config.draft is not None and config.draft.reads_hidden
        self.hidden_proj = nn.Linear(width, width, bias=False) if reads_hidden else None

    def forward(
        self,
        blocks: Tensor,
        view: ContextView,
        mask: Tensor | None,
        modulations: list[Modulation] | None,
        start: Tensor | int = 0,
    ) -> Tensor:
        """blocks (B, K, T) of ids, masked or not -> hidden (B, K, T, D), normed.

        start: position of each block's first token, (B, K) where they differ. mask broadcastable to
        (B, Hq, K*T, S + K*T), or None: every block sees all keys.
        """
        h = self.embed(blocks)
        if self.hidden_proj is not None and view.hidden is not None:  # zeros of an empty context
            h = h + self.hidden_proj(view.hidden.to(h.dtype)).unsqueeze(2)
        rotation, added = self._block_rotation(start, blocks), None
        for index, layer in enumerate(self.each_layer()):
            modulation = None if modulations is None else modulations[index]
            h, u = layer.pre_norm(h, added, modulation)
            y = _mix(layer, u, view.layers[self.reads[index]], mask, rotation, self._bidirectional)
            added = y, None if modulation is None else modulation.gate
        return self.finish(h, added)

    def embed(self, ids: Tensor) -> Tensor:
        """As for any tower; a mask outside the vocabulary has an embedding of its own, or one for
        each position of a block (..., T), of which the last goes on.
        """
        if self.mask_embedding is None:
            return super().embed(ids)
        masks: Tensor = self.mask_embedding
        if masks.dim() == 2:
            positions = torch.arange(ids.shape[-1], device=ids.device)
            masks = masks[positions.clamp(max=len(masks) - 1)]
        is_mask = (ids == self.config.vocab_size).unsqueeze(-1)
        h = super().embed(ids.clamp(max=self.config.vocab_size - 1))
        return torch.where(is_mask, masks.to(h.dtype), h)

    def _block_rotation(self, start: Tensor | int, blocks: Tensor) -> Rotation | None:
        """How the tokens of blocks (B, K, T) are turned, blocks one after another."""
        length = blocks.shape[-1]
        if not isinstance(start, Tensor):
            return self.rotation(start, length, blocks.device)
        found = self.rotation(start.flatten(), length, blocks.device)  # (B*K, T, 1, A)
        if found is None:
            return None
        return Rotation(*(part.unflatten(0, start.shape).flatten(1, 2) for part in found))


def _mix(
    layer: Layer,
    u: Tensor,
    state: LayerState,
    mask: Tensor | None,
    rotation: Rotation | None,
    bidirectional: bool,
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
        y, _ = mixer(u.flatten(1, 2), state, mask, rotation)
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
