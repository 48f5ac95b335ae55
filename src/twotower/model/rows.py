"""How rows enter and leave a cache of the context tower, while the others stay where they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.model.state import ContextCache, LayerState, select_states, with_room

# A cache is copied to a smaller one when its buffers have room for so many times its rows.
_MAX_SPARE_ROWS = 4


def select_rows(cache: ContextCache, rows: Tensor) -> ContextCache:
    """A new cache with copies of some rows: rows (R,) int64."""
    chosen, hidden = object.__new__(ContextCache), cache.last_hidden
    chosen.version = object()
    chosen.lengths = cache.lengths[rows.cpu()]
    chosen.last_hidden = None if hidden is None else hidden[rows.to(hidden.device)]
    chosen.buffers = list(select_states(cache.layers, rows))
    return chosen


def keep_rows(cache: ContextCache, rows: Sequence[int]) -> list[int]:
    """Drop all other rows, in place; returns the rows kept in the order in which they now are.

    Only rows that fill the slots of others are moved, or all where much room would be left.
    """
    kept, movers = set(rows), iter(sorted(row for row in rows if row >= len(rows)))
    order = [slot if slot in kept else next(movers) for slot in range(len(rows))]
    chosen = torch.tensor(order, dtype=torch.int64)
    room = max((len(s.k) for s in cache.buffers if isinstance(s, KV)), default=0)
    if len(order) * _MAX_SPARE_ROWS <= room:
        cache.__dict__.update(select_rows(cache, chosen).__dict__)
        return order
    cache.version = object()
    moves = [(p, row, int(cache.lengths[row])) for p, row in enumerate(order) if p != row]
    for index, state in enumerate(cache.buffers):
        if isinstance(state, KV):
            for buffer in state:
                for slot, row, length in moves:
                    buffer[slot, :length] = buffer[row, :length]
                    buffer[slot, length:] = 0  # no NaN of a row that left
        elif state is not None:
            cache.buffers[index] = type(state)(*(part[chosen.to(part.device)] for part in state))
    if cache.last_hidden is not None:
        cache.last_hidden = cache.last_hidden[chosen.to(cache.last_hidden.device)]
    cache.lengths = cache.lengths[chosen]
    return order


def append_rows(cache: ContextCache, other: ContextCache) -> None:
    """Add copies of another cache's rows behind these. Whole or not at all, as `commit` is."""
    first, last = cache.num_rows, cache.num_rows + other.num_rows
    hidden, length = _joined_hidden(cache, other), max(cache.num_past, other.num_past)
    joined: list[LayerState] = []
    for mine, its in zip(cache.buffers, other.layers, strict=True):
        if isinstance(mine, KV) and isinstance(its, KV):
            grown = KV(*(with_room(part, last, cache.num_past, length) for part in mine))
            joined.append(grown)
            for buffer, part in zip(grown, its, strict=True):
                buffer[first:last, : part.shape[1]] = part
                buffer[first:last, part.shape[1] :] = 0  # no NaN of a row that left
        elif mine is None or its is None:
            joined.append(None)
        else:
            joined.append(type(mine)(*(torch.cat(parts) for parts in zip(mine, its, strict=True))))
    cache.buffers, cache.last_hidden, cache.version = joined, hidden, object()
    cache.lengths = torch.cat([cache.lengths, other.lengths])


def _joined_hidden(one: ContextCache, two: ContextCache) -> Tensor | None:
    """`last_hidden` of both; zeros where a cache has no token yet."""
    known = next((c.last_hidden for c in (one, two) if c.last_hidden is not None), None)
    if known is None:
        return None
    return torch.cat(
        [
            known.new_zeros(c.num_rows, known.shape[1]) if c.last_hidden is None else c.last_hidden
            for c in (one, two)
        ]
    )
