"""Copies of what one row's cache holds, and a cache made of such copies.

Nothing here shares memory with a cache that goes on: neither side can change the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.state import ContextCache
from twotower.model.view import LayerState

Keys = tuple[KV | None, ...]  # of some tokens, layer by layer: each (1, n, Hk, A)


@dataclass(frozen=True)
class Mark:
    """What a cache of one row holds besides keys: each Mamba layer's state, (1, ...), and the
    tower's last output (1, D).
    """

    states: tuple[MambaState | None, ...]
    last_hidden: Tensor


def copy_keys(cache: ContextCache, start: int) -> Keys:
    """Keys and values of the tokens from `start` on."""
    return tuple(
        KV(state.k[:, start:].clone(), state.v[:, start:].clone())
        if isinstance(state, KV)
        else None
        for state in cache.layers
    )


def copy_mark(cache: ContextCache) -> Mark:
    """The rest of what the cache holds, after its last token."""
    assert cache.num_rows == 1 and cache.last_hidden is not None
    states = tuple(
        MambaState(state.conv.clone(), state.ssm.clone()) if isinstance(state, MambaState) else None
        for state in cache.layers
    )
    return Mark(states, cache.last_hidden.clone())


def fill(cache: ContextCache, pieces: Sequence[Keys], mark: Mark, num_tokens: int) -> None:
    """Let an empty cache of one row hold num_tokens >= 1 tokens: their keys, in order, and the
    mark after the last.
    """
    states: list[LayerState] = []
    for layer, state in enumerate(mark.states):
        keys = [kv for piece in pieces if (kv := piece[layer]) is not None]
        if state is not None:
            conv, ssm = (part.clone().unsqueeze(1) for part in state)  # one block of states
            states.append(MambaState(conv, ssm))
        elif keys:
            k, v = (torch.cat(parts, dim=1) for parts in zip(*keys, strict=True))
            states.append(KV(k, v))
        else:
            states.append(None)
    hidden = mark.last_hidden.clone().unsqueeze(1).expand(-1, num_tokens, -1)
    cache.commit(cache.output_of(hidden, states), torch.tensor([num_tokens]))


def keys_bytes(keys: Keys) -> int:
    """Memory of keys and values."""
    return sum(part.numel() * part.element_size() for kv in keys if kv for part in kv)


def mark_bytes(mark: Mark) -> int:
    """Memory of a mark."""
    tensors = [part for state in mark.states if state for part in state]
    return sum(part.numel() * part.element_size() for part in (*tensors, mark.last_hidden))
