"""Rows that share passes, and what a mode does with them in one cycle."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from twotower.engine.events import Event, TokenLogprob
from twotower.engine.faults import attempt, failure
from twotower.engine.row import Row
from twotower.engine.seat import Seat
from twotower.model import ContextCache, TwoTower

Logprobs = Sequence[TokenLogprob] | None  # of a row's new tokens, when it asked for them
Proposal = tuple[Tensor, ...]  # what a mode's denoiser work leaves for its context work


@dataclass(frozen=True)
class Batch:
    """Unfinished rows that are equal in all that shapes a pass, the cache of their texts, and what
    the denoiser has of it.
    """

    rows: list[Row]
    cache: ContextCache
    seat: Seat

    def join(self, other: "Batch") -> "Batch":
        """These rows and then the other's."""
        seat = self.seat.join(self.cache, other.seat, other.cache)
        return Batch(self.rows + other.rows, self.cache.concat(other.cache), seat)

    def part(self, places: Sequence[int]) -> "Batch":
        """The rows at some places, in order; the batch itself when these are all."""
        if len(places) == len(self.rows):
            return self
        chosen = torch.tensor(places, dtype=torch.int64)
        rows = [self.rows[place] for place in places]
        return Batch(rows, self.cache.select(chosen), self.seat.part(chosen))


@dataclass(frozen=True)
class Cycle:
    """How a mode advances a batch by one unit: a block, a draft, a token.

    `propose` is the denoiser's work and leaves the cache alone; `start` (of rows whose prompts have
    just been read) and `settle` (what the rows commit) are the context tower's. So one batch can be
    in one queue while another is in the other. `start` and `settle` return the rows that go on.
    """

    start: Callable[[TwoTower, Batch], Generator[Event, None, Batch]]
    propose: Callable[[TwoTower, Batch], Generator[Event, None, Proposal]]
    settle: Callable[[TwoTower, Batch, Proposal], Generator[Event, None, Batch]]
    num_unread: int = 0  # tokens at a prompt's end that are not in the cache when rows start


def start_at_once(model: TwoTower, batch: Batch) -> Generator[Event, None, Batch]:
    """Nothing to do but to read the prompts, which has been done."""
    yield from ()
    return batch


def commit(
    batch: Batch, tokens: Sequence[list[int]], logprobs: Sequence[Logprobs] | None = None
) -> Generator[Event, None, tuple[Batch, Tensor]]:
    """Hand each row its tokens; returns the batch of the rows that go on, and their numbers.

    logprobs: of each row's tokens, if it asked for them; None if no row did.
    A row that cannot take them (its text, its filters) ends alone.
    """
    going = []
    known = [None] * len(tokens) if logprobs is None else logprobs
    for place, (row, own) in enumerate(zip(batch.rows, tokens, strict=True)):
        try:
            yield row.commit(own, known[place])
            if row.is_finished:
                yield row.finished()
            else:
                going.append(place)
        except Exception as error:
            yield failure(row, error)
    kept = torch.tensor(going, dtype=torch.int64)
    return batch.part(going), kept


def extend(model: TwoTower, batch: Batch, tokens: Tensor) -> Generator[Event, None, Batch]:
    """Let the context tower read tokens (B, n) of the batch's rows; none, no pass.

    Returns the rows that go on: those whose reading fails do not.
    """
    if not batch.rows:
        return batch

    def read(places: Sequence[int]) -> Generator[Event, None, Batch]:
        yield from ()
        some = batch.part(places)
        model.extend(some.cache, tokens[list(places)])
        for row in some.rows:
            row.context_forwards += 1
        return some

    return joined((yield from attempt(batch.rows, read, batch.cache)), batch)


def joined(parts: Sequence[Batch], whole: Batch) -> Batch:
    """Parts of a batch as one batch again; an empty one where none is left."""
    return reduce(Batch.join, parts) if parts else whole.part([])


def last_tokens(rows: list[Row]) -> Tensor:
    """The newest token of each row: (B, 1) on the CPU."""
    return torch.tensor([[(row.tokens or row.prompt)[-1]] for row in rows])
