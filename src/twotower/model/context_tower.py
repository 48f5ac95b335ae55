"""The context tower: the causal backbone. It alone writes state."""

from torch import Tensor

from twotower.layers.attention import KV, Attention
from twotower.layers.mamba2 import Mamba2, MambaInputs, MambaState
from twotower.model.tower import Tower
from twotower.model.view import LayerState

NewState = LayerState | MambaInputs  # inputs where the caller decides later how many tokens stay


class ContextTower(Tower):
    """The causal tower: each layer starts from its own past and hands on its new state."""

    def forward(
        self,
        ids: Tensor,
        past: tuple[LayerState, ...] | None,
        mask: Tensor | None,
        counts: Tensor | None,
        states_every: int | None,
        start: Tensor | int = 0,
        depths: Tensor | None = None,
    ) -> tuple[Tensor, list[NewState]]:
        """ids (B, L) after a past -> hidden (B, L, D), normed, and each layer's new state.

        Past, new state: KV of S, L tokens; MambaState with leading (B,), (B, L/states_every), or
        MambaInputs where states_every is None. start: tokens of the past, (B,) where rows differ.
        depths: as `rotation` takes them.
        """
        h, added = self.embed(ids), None
        rotation = self.rotation(start, ids.shape[1], ids.device, depths)
        states: list[NewState] = []
        for index, layer in enumerate(self.each_layer()):
            h, u = layer.pre_norm(h, added)
            before = None if past is None else past[index]
            state: NewState = None
            if isinstance(layer.mixer, Mamba2):
                assert before is None or isinstance(before, MambaState)
                y, state = layer.mixer(u, before, counts, states_every)
            elif isinstance(layer.mixer, Attention):
                assert before is None or isinstance(before, KV)
                y, state = layer.mixer(u, before, mask, rotation)
            else:
                y = layer.mixer(u)
            added = y, None
            states.append(state)
        return self.finish(h, added), states
