"""What the denoiser reads of the context: a frozen view, layer by layer.

It is all that a denoiser can get, so nothing of an unfinished block ever reaches the cache.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState

LayerState = KV | MambaState | None


@dataclass(eq=False)
class Version:
    """Stands for the contents of a cache. addresses: of its buffers, if who wrote them told."""

    addresses: object = None


@dataclass(frozen=True)
class ContextView:
    """What the denoiser may read of the context.

    `layers[i]`: KV of S tokens (B, S, Hk, A); MambaState at the start of each of K blocks, conv
    (B, K, C, W-1), ssm (B, K, H, P, N), K = 1 in generation; None for a layer without state,
    or that nobody reads. `lengths` (B,) on the CPU, or None when every row has all S tokens.
    `hidden` (B, K, D): the tower's output at the last token before each block, zeros where there is
    none. `version`: the same object stands for the same contents (`ContextCache.version`); None
    says nothing.
    """

    layers: tuple[LayerState, ...]
    lengths: Tensor | None
    num_past: int
    num_rows: int
    hidden: Tensor | None = None
    version: Version | None = None

    def to(self, device: torch.device | str) -> "ContextView":
        """The same view on another device; what is there already is not copied."""
        layers = map_states(self.layers, lambda part: part.to(device))
        hidden = None if self.hidden is None else self.hidden.to(device)
        return replace(self, layers=layers, hidden=hidden)

    def select(self, rows: Tensor) -> "ContextView":
        """The view of some rows: rows (R,) int64."""
        lengths = None if self.lengths is None else self.lengths[rows.cpu()]
        hidden = None if self.hidden is None else self.hidden[rows.to(self.hidden.device)]
        layers = select_states(self.layers, rows)
        return ContextView(layers, lengths, self.num_past, len(rows), hidden, Version())


def map_states(
    layers: Iterable[LayerState], change: Callable[[Tensor], Tensor], kind: type = tuple
) -> tuple[LayerState, ...]:
    """Each layer's state with every tensor of it changed, where it is of a kind."""
    return tuple(
        type(state)(*map(change, state)) if state and isinstance(state, kind) else state
        for state in layers
    )


def select_states(layers: Iterable[LayerState], rows: Tensor) -> tuple[LayerState, ...]:
    """Each layer's state of some rows: rows (R,) int64."""
    return map_states(layers, lambda part: part[rows.to(part.device)])
