"""Rows that share passes, and what a mode does with them in one cycle."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.engine.events import Event
from twotower.engine.row import Row
from twotower.model import ContextCache, TwoTower

Proposal = tuple[Tensor, ...]  # what a mode's denoiser work leaves for its context work


@dataclass(frozen=True)
class Batch:
    """Unfinished rows that are equal in all that shapes a pass, and the cache of their texts."""

    rows: list[Row]
    cache: ContextCache

    def join(self, other: "Batch") -> "Batch":
        """These rows and then the other's."""
        return Batch(self.rows + other.rows, self.cache.concat(other.cache))

    def select(self, chosen: list[int]) -> "Batch":
        """Some of the rows, by their place here."""
        cache = self.cache.select(torch.tensor(chosen, dtype=torch.int64))
        return Batch([self.rows[place] for place in chosen], cache)


@dataclass(frozen=True)
class Cycle:
    """How a mode advances a batch by one unit: a block, a draft, a token.

    `propose` is the denoiser's work and leaves the cache alone; `start` (the prompts of rows that
    join) and `settle` (what the rows commit) are the context tower's. So one batch can be in one
    queue while another is in the other. `start` and `settle` return the rows that go on.
    """

    start: Callable[[TwoTower, list[Row]], Generator[Event, None, Batch]]
    propose: Callable[[TwoTower, Batch], Generator[Event, None, Proposal]]
    settle: Callable[[TwoTower, Batch, Proposal], Generator[Event, None, Batch]]


def commit(
    batch: Batch, tokens: Sequence[list[int]]
) -> Generator[Event, None, tuple[Batch, Tensor]]:
    """Hand each row its tokens; returns the batch of the rows that go on, and their numbers."""
    for row, own in zip(batch.rows, tokens, strict=True):
        yield row.commit(own)
        if row.is_finished:
            yield row.finished()
    going = [i for i, row in enumerate(batch.rows) if not row.is_finished]
    kept = torch.tensor(going, dtype=torch.int64)
    if len(going) == len(batch.rows):
        return batch, kept
    return Batch([batch.rows[i] for i in going], batch.cache.select(kept)), kept


def extend(model: TwoTower, batch: Batch, tokens: Tensor) -> None:
    """Let the context tower read tokens (B, n) of the batch's rows; none, no pass."""
    if batch.rows:
        model.extend(batch.cache, tokens)
    for row in batch.rows:
        row.context_forwards += 1


def last_tokens(rows: list[Row]) -> Tensor:
    """The newest token of each row: (B, 1) on the CPU."""
    return torch.tensor([[(row.tokens or row.prompt)[-1]] for row in rows])
