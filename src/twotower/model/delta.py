"""What a copy of a cache, on another device or host, lacks of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.state import ContextCache
from twotower.model.view import LayerState, map_states


class CacheDelta(NamedTuple):
    """What a cache holds beyond a copy of it: counts (B,) tokens of each row.

    states: keys and values of these tokens alone, right-padded to the most, and each Mamba layer's
    state, with leading (B, 1); hidden (B, D), the last output.
    """

    states: Sequence[LayerState]
    hidden: Tensor
    counts: Tensor

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> "CacheDelta":
        """The same on another device, but for counts, and in what passes compute there and keep
        keys and values in, unless these are None; SSM states are in float32 everywhere.
        """
        dtype = dtype or self.hidden.dtype
        states = map_states(self.states, lambda part: part.to(device))
        states = map_states(states, lambda part: part.to(dtype=kv_dtype), KV)
        cast = tuple(
            MambaState(state.conv.to(dtype), state.ssm) if isinstance(state, MambaState) else state
            for state in states
        )
        return CacheDelta(cast, self.hidden.to(device, dtype), self.counts)


def delta_since(cache: ContextCache, lengths: Tensor) -> CacheDelta:
    """What the cache holds beyond the first lengths (B,) tokens of its rows."""
    counts = cache.lengths - lengths
    most = int(counts.max()) if len(counts) else 0
    first = int(lengths[0]) if len(lengths) else 0
    is_even = bool((lengths == first).all()) and bool((counts == most).all())
    cut = slice(first, first + most) if is_even else None
    keys = map_states(cache.layers, lambda part: _tokens_from(part, cut, lengths, most), KV)
    states = map_states(keys, lambda part: part.unsqueeze(1), MambaState)
    assert cache.last_hidden is not None  # something was read
    return CacheDelta(states, cache.last_hidden, counts)


def apply_delta(cache: ContextCache, delta: CacheDelta) -> None:
    """Commit what `delta_since` of another cache gave for this one's lengths."""
    most = int(delta.counts.max()) if len(delta.counts) else 0
    if most == 0:
        return
    hidden = delta.hidden.unsqueeze(1).expand(-1, most, -1)
    cache.commit(cache.output_of(hidden, delta.states), delta.counts)


def _tokens_from(buffer: Tensor, cut: slice | None, starts: Tensor, length: int) -> Tensor:
    """`length` tokens of a buffer (B, room, Hk, A): one cut of all rows, or each from its start."""
    if cut is not None:
        return buffer[:, cut]
    position = starts.unsqueeze(1) + torch.arange(length)
    position = position.clamp(max=buffer.shape[1] - 1).to(buffer.device)  # padding: any token
    return buffer[torch.arange(len(buffer), device=buffer.device).unsqueeze(1), position]
