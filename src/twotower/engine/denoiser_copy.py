"""A denoiser on another device: it reads a copy of the batch's cache.

Before a block the copy follows the batch: rows that left are dropped, and only what the context
tower has read since travels.
"""

from collections.abc import Iterator, Sequence

import torch

from twotower.diffusion import Step
from twotower.engine.denoiser import Blocks, denoise_rows
from twotower.engine.row import Row
from twotower.model import ContextCache, TwoTower
from twotower.model.delta import CacheDelta, apply_delta, delta_since
from twotower.model.rows import append_rows, select_rows


class CopyDenoiser:
    """On another device of this process: a copy of the cache is read."""

    def __init__(self, model: TwoTower) -> None:
        self._model, self._follower = model, Follower()
        self._copy = CacheCopy(model.empty_cache(1, model.denoiser_device))

    def fill(self, rows: Sequence[Row], cache: ContextCache, blocks: Blocks) -> Iterator[Step]:
        sources, delta = self._follower.lacks(rows, cache)
        self._copy.update(sources, delta.to(self._model.denoiser_device))
        self._follower.holds(rows, cache)
        return denoise_rows(self._model, self._copy.cache.view(self._model.config.reads), blocks)


class CacheCopy:
    """The copy of a batch's cache. empty: a cache of one row before its first token."""

    def __init__(self, empty: ContextCache) -> None:
        self.cache, self._empty = select_rows(empty, torch.tensor([0])), empty

    def update(self, sources: Sequence[int], delta: CacheDelta) -> None:
        """Become the cache of rows which were the `sources` of this one, -1 for a new row, and have
        read what is in the delta since.
        """
        if list(sources) != list(range(self.cache.num_rows)):
            append_rows(self.cache, self._empty)  # the last row, which -1 picks
            self.cache = select_rows(self.cache, torch.tensor(sources))
        apply_delta(self.cache, delta)


class Follower:
    """Knows what a copy holds. After a failure between `lacks` and `holds` it is made anew."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}  # tokens of each row, by its index, in the copy's order

    def lacks(self, rows: Sequence[Row], cache: ContextCache) -> tuple[list[int], CacheDelta]:
        """What `CacheCopy.update` needs to become the rows' cache."""
        held, self._held = self._held, {}
        order, indices = list(held), [row.index for row in rows]
        sources = [order.index(index) if index in held else -1 for index in indices]
        lengths = torch.tensor([held.get(index, 0) for index in indices])
        return sources, delta_since(cache, lengths)

    def holds(self, rows: Sequence[Row], cache: ContextCache) -> None:
        """The copy is the rows' cache now."""
        lengths = cache.lengths.tolist()
        self._held = {row.index: n for row, n in zip(rows, lengths, strict=True)}
