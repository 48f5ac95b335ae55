"""Contexts of earlier texts, kept for texts that begin alike.

A prompt is read in pieces that end at fixed positions, whatever is known of it; there, and nowhere
else, a context is kept and taken up again. So what is read after a known beginning is read by the
same operations on the same numbers as without it: results are equal to the last bit.
"""

import weakref
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from twotower.engine.batch import Batch
from twotower.model import ContextCache, TwoTower
from twotower.model.delta import CacheDelta
from twotower.model.pieces import Keys, copy_keys, copy_mark, fill, num_bytes

# Early in a text, where most beginnings part, pieces are as short as `model.prefix_chunk`; later
# ones are as long as reading is cheap.
_LATE, _LATE_CHUNK = 256, 128


class _Node:
    """A piece of a text after those of its parents; the context after it, while it is kept.

    Parents hold their children and not the other way round, so that a cache that is given up is
    gone at once, without the garbage collector.
    """

    def __init__(self, parent: "_Node | None", tokens: bytes, end: int) -> None:
        self._parent = None if parent is None else weakref.ref(parent)
        self.tokens, self.end = tokens, end
        self.children: dict[bytes, _Node] = {}
        self.keys: Keys = ()
        self.mark: CacheDelta | None = None

    @property
    def parent(self) -> "_Node | None":
        """The piece before, as long as it is known."""
        return None if self._parent is None else self._parent()

    def path(self) -> "list[_Node]":
        """The pieces up to here, the root left out."""
        nodes: list[_Node] = []
        node: _Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(kw_only=True)
class PrefixStats:
    """What a prefix cache holds and has saved."""

    cache_hits: int = 0  # prompts of which a part was known
    cache_misses: int = 0
    cache_saved_tokens: int = 0  # of prompts, that were not read again
    cache_bytes: int = 0
    cache_evictions: int = 0  # contexts that made room for others


class PrefixCache:
    """Contexts within `max_bytes`; the one that was unused for longest goes first.

    For one model and one thread at a time; `stats` may be read by any.
    """

    def __init__(self, model: TwoTower, max_bytes: int) -> None:
        self._model, self._max_bytes = model, max_bytes
        self._root = _Node(None, b"", 0)
        self._used: OrderedDict[_Node, None] = OrderedDict()  # nodes with a mark, oldest use first
        self.stats = PrefixStats()

    def read_prompt(self, batch: Batch, num_tokens: int) -> None:
        """Read the prompt of a batch of one row on, about so many tokens, in pieces that end at the
        fixed positions: what else is read in between changes no bit.
        """
        (row,) = batch.rows
        if batch.cache.num_past == 0:
            known = row.prompt[: len(row.prompt) - batch.num_unread]
            batch.cache, row.cached_tokens = self.take(known)
        while num_tokens > 0 and not batch.has_read:
            size = self.piece(batch.cache.num_past)
            batch.read(size)
            self.keep(row.prompt, batch.cache)
            num_tokens -= size

    def take(self, tokens: Sequence[int]) -> tuple[ContextCache, int]:
        """A cache of one row that holds the longest known beginning of the tokens, and its length.

        What follows is to be read in pieces of `piece` tokens, each with a `keep` behind it.
        """
        node = self._known(tokens)
        self.stats.cache_hits += node.end > 0
        self.stats.cache_misses += node.end == 0
        self.stats.cache_saved_tokens += node.end
        return self._context(node), node.end

    def piece(self, start: int) -> int:
        """How many tokens are to be read together after `start` others."""
        return boundary_after(start, self._model.prefix_chunk) - start

    def keep(self, tokens: Sequence[int], cache: ContextCache) -> bool:
        """Keep the context of a cache that holds the first of the tokens, if it ends with a piece
        and those before it are known; returns whether it is known now.
        """
        end, node, start = int(cache.lengths[0]), self._root, 0
        while (stop := boundary_after(start, self._model.prefix_chunk)) < end:
            child = node.children.get(_packed(tokens[start:stop]))
            if child is None:  # forgotten to make room
                return False
            node, start = child, stop
        return stop == end and self._keep(node, _packed(tokens[start:end]), end, cache)

    def read(self, tokens: Sequence[int]) -> tuple[ContextCache, int]:
        """A cache of one row that holds the tokens, and how many of them were known."""
        cache, known = self.take(tokens)
        for _ in self._read_after(cache, tokens):
            pass
        return cache, known

    def remember(self, tokens: Sequence[int]) -> Iterator[None]:
        """Read a text only to know it later: one piece at each step."""
        node = self._known(tokens)
        whole = tokens[: last_boundary(len(tokens), self._model.prefix_chunk)]
        if node.end < len(whole):
            for is_kept in self._read_after(self._context(node), whole):
                if not is_kept:
                    return
                yield

    def _known(self, tokens: Sequence[int]) -> _Node:
        """The longest beginning whose context is kept; the root when there is none."""
        best = node = self._root
        while True:
            end = boundary_after(node.end, self._model.prefix_chunk)
            piece = _packed(tokens[node.end : end])
            if end > len(tokens) or piece not in node.children:
                return best
            node = node.children[piece]
            if node.mark is not None:
                best = node

    def _context(self, node: _Node) -> ContextCache:
        """A cache of one row that holds the tokens up to a node with a context."""
        cache = self._model.empty_cache(1)
        if node.mark is not None:
            fill(cache, [one.keys for one in node.path()], node.mark, node.end)
            self._used.move_to_end(node)
        return cache

    def _read_after(self, cache: ContextCache, tokens: Sequence[int]) -> Iterator[bool]:
        """Read what the cache lacks of the tokens, piece by piece; yields whether each is known."""
        while (start := int(cache.lengths[0])) < len(tokens):
            self._model.extend(cache, torch.tensor([tokens[start : start + self.piece(start)]]))
            yield self.keep(tokens, cache)

    def _keep(self, parent: _Node, tokens: bytes, end: int, cache: ContextCache) -> bool:
        """Keep the context after a piece; False if there is no room for it."""
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = _Node(parent, tokens, end)
            node.keys = copy_keys(cache, parent.end)
            self.stats.cache_bytes += num_bytes(node.keys) + len(tokens)
        if node.mark is None:
            node.mark = copy_mark(cache)
            self.stats.cache_bytes += num_bytes(node.mark.states) + node.mark.hidden.nbytes
        self._used[node] = None
        self._used.move_to_end(node)
        while self.stats.cache_bytes > self._max_bytes:
            oldest, _ = self._used.popitem(last=False)
            self._forget(oldest)
            self.stats.cache_evictions += 1
        return node.mark is not None

    def _forget(self, node: _Node) -> None:
        """Drop a context, and the keys that no other needs."""
        assert node.mark is not None
        self.stats.cache_bytes -= num_bytes(node.mark.states) + node.mark.hidden.nbytes
        node.mark = None
        while node.parent is not None and node.mark is None and not node.children:
            self.stats.cache_bytes -= num_bytes(node.keys) + len(node.tokens)
            del node.parent.children[node.tokens]
            node = node.parent


def boundary_after(position: int, chunk: int) -> int:
    """Where the piece ends that the token at `position` belongs to; early pieces are `chunk` long.

    It depends on nothing else, so that all texts share their boundaries.
    """
    step = chunk if position < _LATE else max(chunk, _LATE_CHUNK)
    return (position // step + 1) * step


def last_boundary(length: int, chunk: int) -> int:
    """Where the last whole piece of a text of `length` tokens ends; 0 if it has none."""
    step = chunk if length < _LATE else max(chunk, _LATE_CHUNK)
    return length // step * step


def _packed(tokens: Sequence[int]) -> bytes:
    return array("q", tokens).tobytes()
