"""How rows enter and leave a cache of the context tower, while the others stay where they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.model.state import ContextCache, with_room
from twotower.model.view import LayerState, Version, select_states

# A cache is copied to a smaller one when its buffers have room for so many times its rows.
_MAX_SPARE_ROWS = 4


def select_rows(cache: ContextCache, rows: Tensor) -> ContextCache:
    """A new cache with copies of some rows: rows (R,) int64."""
    chosen, hidden = object.__new__(ContextCache), cache.last_hidden
    chosen.version = Version()
    chosen.lengths = cache.lengths[rows.cpu()]
    chosen.last_hidden = None if hidden is None else hidden[rows.to(hidden.device)]
    chosen.buffers = list(select_states(cache.layers, rows))
    chosen.output_buffer = cache.outputs
    if chosen.output_buffer is not None:
        chosen.output_buffer = chosen.output_buffer[rows.to(chosen.output_buffer.device)]
    return chosen


def view_row(cache: ContextCache, row: int, length: int) -> ContextCache:
    """Keys, values and outputs of the first tokens of one row, as far as there are any, to be read:
    they lie in the cache's own memory, and are good until it changes.
    """
    length = min(length, int(cache.lengths[row]))
    view, part = object.__new__(ContextCache), (slice(row, row + 1), slice(length))
    view.version = Version()
    view.lengths = torch.tensor([length])
    view.last_hidden = None
    view.buffers = [KV(*(b[part] for b in s)) if isinstance(s, KV) else None for s in cache.buffers]
    view.output_buffer = None if cache.output_buffer is None else cache.output_buffer[part]
    return view


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
    cache.version = Version()
    moves = [(p, row, int(cache.lengths[row])) for p, row in enumerate(order) if p != row]
    if cache.output_buffer is not None:
        _move(cache.output_buffer, moves)
    for index, state in enumerate(cache.buffers):
        if isinstance(state, KV):
            for buffer in state:
                _move(buffer, moves)
        elif state is not None:
            cache.buffers[index] = type(state)(*(part[chosen.to(part.device)] for part in state))
    if cache.last_hidden is not None:
        cache.last_hidden = cache.last_hidden[chosen.to(cache.last_hidden.device)]
    cache.lengths = cache.lengths[chosen]
    return order


def _move(buffer: Tensor, moves: Sequence[tuple[int, int, int]]) -> None:
    """Put rows into the slots of others: slot, row and its length."""
    for slot, row, length in moves:
        buffer[slot, :length] = buffer[row, :length]
        buffer[slot, length:] = 0  # no NaN of a row that left


def append_rows(cache: ContextCache, other: ContextCache) -> None:
    """Add copies of another cache's rows behind these. Whole or not at all, as `commit` is."""
    sizes = cache.num_rows, cache.num_past, max(cache.num_past, other.num_past)
    hidden, outputs = _joined_hidden(cache, other), cache.output_buffer
    if outputs is not None and other.outputs is not None:
        outputs = _appended(outputs, other.outputs, *sizes)
    joined: list[LayerState] = []
    for mine, its in zip(cache.buffers, other.layers, strict=True):
        if isinstance(mine, KV) and isinstance(its, KV):
            pairs = zip(mine, its, strict=True)
            joined.append(KV(*(_appended(buffer, part, *sizes) for buffer, part in pairs)))
        elif mine is None or its is None:
            joined.append(None)
        else:
            joined.append(type(mine)(*(torch.cat(parts) for parts in zip(mine, its, strict=True))))
    cache.buffers, cache.last_hidden, cache.version = joined, hidden, Version()
    cache.lengths, cache.output_buffer = torch.cat([cache.lengths, other.lengths]), outputs


def _appended(buffer: Tensor, part: Tensor, first: int, num_past: int, length: int) -> Tensor:
    """A buffer, or a grown copy, with a part of other rows behind its `first` own."""
    grown = with_room(buffer, first + len(part), num_past, length)
    grown[first : first + len(part), : part.shape[1]] = part
    grown[first : first + len(part), part.shape[1] :] = 0  # no NaN of a row that left
    return grown


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
