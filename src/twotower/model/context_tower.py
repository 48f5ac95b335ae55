"""The context tower: the causal backbone. It alone writes state."""

from functools import partial

import torch
from torch import Tensor

from twotower import masks
from twotower.kernels import ssd
from twotower.layers.attention import KV, Attention
from twotower.layers.mamba2 import Mamba2, MambaInputs, MambaState, states_after
from twotower.model.state import ContextCache, ForwardOutput, LayerState
from twotower.model.tower import Tower

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
    ) -> tuple[Tensor, list[NewState]]:
        """ids (B, L) after a past -> hidden (B, L, D), normed, and each layer's new state.

        Past, new state: KV of S, L tokens; MambaState with leading (B,), (B, L/states_every), or
        MambaInputs where states_every is None.
        """
        h = self.embed(ids)
        states: list[NewState] = []
        for index, layer in enumerate(self.each_layer()):
            u = layer.pre_norm(h)
            before = None if past is None else past[index]
            state: NewState = None
            if isinstance(layer.mixer, Mamba2):
                assert before is None or isinstance(before, MambaState)
                y, state = layer.mixer(u, before, counts, states_every)
            elif isinstance(layer.mixer, Attention):
                assert before is None or isinstance(before, KV)
                y, state = layer.mixer(u, before, mask)
            else:
                y = layer.mixer(u)
            h = layer.add_residual(h, y)
            states.append(state)
        return self.finish(h), states

    def extend(self, cache: ContextCache, ids: Tensor, counts: Tensor | None) -> Tensor:
        """Read ids (B, L) after the cache and commit them; returns hidden (B, L, D), normed.

        counts (B,): valid tokens of each row, or None when all are.
        """
        num_rows, length = ids.shape
        on_device = None if counts is None else counts.to(ids.device)
        output = self._after(cache, ids, on_device, length)
        cache.commit(output, torch.full((num_rows,), length) if counts is None else counts.cpu())
        return output.hidden

    def verify(
        self, cache: ContextCache, ids: Tensor, counts: Tensor | None = None
    ) -> ForwardOutput:
        """Read ids (B, L) after the cache and commit nothing yet: `cache.commit` does.

        counts (B,): as in `extend`; what is found beyond them is finite and means nothing.
        """
        return self._after(cache, ids, counts, None)

    def _after(
        self, cache: ContextCache, ids: Tensor, counts: Tensor | None, states_every: int | None
    ) -> ForwardOutput:
        """`forward` after what the cache holds."""
        length = ids.shape[1]
        if 1 < length <= ssd.TILE:
            # The cache makes the states of all layers at once, which takes fewer operations.
            counts = states_every = None
        if cache.is_uniform:
            mask = masks.causal(length, 0, ids.device)  # all of the past is seen
        else:
            mask = masks.causal_rows(length, cache.lengths.to(ids.device), cache.num_past)
        hidden, states = self(ids, cache.layers, mask, counts, states_every)
        inputs = [state for state in states if isinstance(state, MambaInputs)]
        if not inputs:
            return ForwardOutput(hidden, states)
        others = [None if isinstance(state, MambaInputs) else state for state in states]
        return ForwardOutput(hidden, others, partial(states_after, inputs))
