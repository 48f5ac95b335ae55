"""Copies of what one row's cache holds, and a cache made of such copies.

Nothing here shares memory with a cache that goes on: neither side can change the other.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.model.delta import CacheDelta, apply_delta, delta_since
from twotower.model.state import ContextCache
from twotower.model.view import LayerState, map_states

Keys = tuple[KV | None, ...]  # of some tokens, layer by layer: each (1, n, Hk, A)


def copy_keys(cache: ContextCache, start: int) -> Keys:
    """Keys and values of the tokens from `start` on."""
    return tuple(
        KV(*(part[:, start:].clone() for part in state)) if isinstance(state, KV) else None
        for state in cache.layers
    )


def copy_mark(cache: ContextCache) -> CacheDelta:
    """The rest of what a cache of one row holds, after its last token: Mamba states, last output,
    and keys of no token.
    """
    mark = delta_since(cache, cache.lengths)
    return CacheDelta(map_states(mark.states, Tensor.clone), mark.hidden.clone(), mark.counts)


def fill(cache: ContextCache, pieces: Sequence[Keys], mark: CacheDelta, num_tokens: int) -> None:
    """Let an empty cache of one row hold num_tokens >= 1 tokens: their keys, in order, and the
    mark after the last.
    """
    states = [*map_states(mark.states, Tensor.clone)]
    for layer, state in enumerate(states):
        if isinstance(state, KV):
            parts = zip(*(piece[layer] or () for piece in pieces), strict=True)
            states[layer] = KV(*(torch.cat(own, dim=1) for own in parts))
    apply_delta(cache, CacheDelta(states, mark.hidden.clone(), torch.tensor([num_tokens])))


def num_bytes(states: Iterable[LayerState]) -> int:
    """Memory of each layer's keys and values, or states."""
    return sum(part.nbytes for state in states if state for part in state)
