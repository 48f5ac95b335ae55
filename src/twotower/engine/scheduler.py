"""Who is decoded when: rows are admitted and retired between cycles, in every mode.

Rows wait in a line and enter in its order, as many at a time as `max_rows`. Rows that are equal in
all that shapes a pass share a batch; batches of other kinds take turns with it. Whose work runs
where is decided in `queues.py`.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from twotower.engine.batch import Batch, Cycle, Proposal
from twotower.engine.block_cycle import BLOCK_CYCLE
from twotower.engine.events import Event, Failed
from twotower.engine.faults import attempt
from twotower.engine.options import Mode
from twotower.engine.prefill import prefill, refusal
from twotower.engine.prefix_cache import PrefixCache
from twotower.engine.row import Row
from twotower.engine.seat import take_seat
from twotower.engine.speculate import SPECULATIVE_CYCLE
from twotower.engine.token_cycle import AR_CYCLE, MOCK_AR_CYCLE
from twotower.model import TwoTower

_IDLE_S = 0.01  # between two questions to an iterator that has nothing at present

CYCLES: dict[Mode, Cycle] = {
    "diffusion": BLOCK_CYCLE,
    "posterior": BLOCK_CYCLE,
    "predict-and-noise": BLOCK_CYCLE,
    "ar": AR_CYCLE,
    "mock-ar": MOCK_AR_CYCLE,
    "speculative": SPECULATIVE_CYCLE,
}


class Line(Protocol):
    """Where rows wait to enter, and what those who brought them say later."""

    @property
    def is_over(self) -> bool:
        """Whether no row waits and none will come."""

    def look(self, count: int) -> int:
        """How many rows wait, counted up to `count`."""

    def take(self, count: int) -> list[Row]:
        """The first rows, at most `count`."""

    def put_back(self, rows: list[Row]) -> None:
        """Rows that could not enter are the first again."""

    def failed(self) -> list[Failed]:
        """Rows that have ended while they waited, since the last call."""

    def reason_to_leave(self, row: Row) -> Failed | None:
        """Why a row that is being decoded is to go no further; asked before each cycle."""

    def wait(self) -> None:
        """Return when there may be something to do; called when nothing is being decoded."""


class WaitingLine:
    """Rows of an iterator in its order; it is read no further than needed.

    A source that gives None has nothing at present and is asked again after a cycle, or after a
    moment when nothing is being decoded.
    """

    def __init__(self, source: Iterable[Row | Failed | None]) -> None:
        self._source = iter(source)
        self._failed: list[Failed] = []
        self._rows: deque[Row] = deque()
        self._is_read = False

    @property
    def is_over(self) -> bool:
        """Whether no row waits and none will come."""
        return self._is_read and not self._rows

    def look(self, count: int) -> int:
        """How many rows wait, counted up to `count`."""
        while len(self._rows) < count and not self._is_read:
            try:
                row = next(self._source)
            except StopIteration:
                self._is_read = True
                break
            if row is None:
                break
            if isinstance(row, Failed):
                self._failed.append(row)
            else:
                self._rows.append(row)
        return min(count, len(self._rows))

    def take(self, count: int) -> list[Row]:
        """The first rows, at most `count`."""
        return [self._rows.popleft() for _ in range(self.look(count))]

    def failed(self) -> list[Failed]:
        """What the source gave instead of rows since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def put_back(self, rows: list[Row]) -> None:
        """Rows that could not enter are the first again."""
        self._rows.extendleft(reversed(rows))

    def reason_to_leave(self, row: Row) -> Failed | None:
        """Nobody calls these rows off."""
        return None

    def wait(self) -> None:
        """An iterator cannot tell when it will have something, so it is left alone for a moment."""
        if not self._rows and not self._is_read:
            time.sleep(_IDLE_S)


class Lane:
    """Batches that are in one queue together: one of each kind of row."""

    def __init__(self, model: TwoTower, prefixes: PrefixCache | None) -> None:
        self._model, self._prefixes = model, prefixes
        self._batches: dict[object, Batch] = {}
        self._proposed: list[tuple[Batch, Proposal]] = []
        self.newcomers: list[Row] = []  # taken from the line, not yet read
        # Of all rows, newcomers included; brought up to date between jobs, since others look at it
        # while a job runs.
        self.num_rows = 0

    def leave(self, line: Line) -> Iterator[Event]:
        """Rows that are called off go, and their part of the cache with them."""
        batches, self._batches = self._batches, {}
        for batch in batches.values():
            reasons = [line.reason_to_leave(row) for row in batch.rows]
            yield from (reason for reason in reasons if reason is not None)
            staying = [i for i, reason in enumerate(reasons) if reason is None]
            self._put(batch.part(staying))
        self._count()

    def take(self, line: Line, count: int, is_alone: bool) -> Iterator[Event]:
        """Take up to `count` rows from the line, as far as memory allows.

        is_alone: nothing else is decoded, so memory will not become free: a row that does not fit
        has failed.
        """
        rows = line.take(count)
        yield from line.failed()
        while rows:
            kind = kind_of(rows[0])
            batch = self._batches.get(kind)
            sharing = [row for row in self.newcomers if kind_of(row) == kind]
            message = refusal(self._model, [*(batch.rows if batch else []), *sharing, rows[0]])
            if message is None:
                self.newcomers.append(rows.pop(0))
                self.num_rows += 1
            elif is_alone and not self.num_rows:
                yield Failed(row=rows.pop(0).index, kind="memory", message=message)
            else:
                break
        line.put_back(rows)

    def start(self) -> Iterator[Event]:
        """Context work: read the prompts of the newcomers, who join their batches."""
        rows, self.newcomers = self.newcomers, []
        for group in _groups(rows):
            for batch in (yield from attempt(group, partial(self._start, group))):
                self._put(batch)
        self._count()

    def propose(self) -> Iterator[Event]:
        """Denoiser work of one cycle of every batch."""
        batches, self._batches = self._batches, {}
        for batch in batches.values():
            self._proposed += yield from attempt(batch.rows, partial(self._propose, batch))

    def settle(self) -> Iterator[Event]:
        """Context work of one cycle of every batch; finished rows leave."""
        proposed, self._proposed = self._proposed, []
        for batch, proposal in proposed:
            work = partial(self._settle, batch, proposal)
            for part in (yield from attempt(batch.rows, work, batch.cache)):
                self._put(part)
        self._count()

    def _start(self, group: list[Row], places: Sequence[int]) -> Generator[Event, None, Batch]:
        rows = [group[place] for place in places]
        cycle = _cycle(rows[0])
        cache = prefill(self._model, rows, cycle.num_unread, self._prefixes)
        batch = Batch(rows, cache, take_seat(self._model))
        return (yield from cycle.start(self._model, batch))

    def _propose(
        self, batch: Batch, places: Sequence[int]
    ) -> Generator[Event, None, tuple[Batch, Proposal]]:
        some = batch.part(places)
        return some, (yield from _cycle(some.rows[0]).propose(self._model, some))

    def _settle(
        self, batch: Batch, proposal: Proposal, places: Sequence[int]
    ) -> Generator[Event, None, Batch]:
        some = batch.part(places)
        own = proposal if some is batch else tuple(part[list(places)] for part in proposal)
        return (yield from _cycle(some.rows[0]).settle(self._model, some, own))

    def _put(self, batch: Batch) -> None:
        if batch.rows:
            kind = kind_of(batch.rows[0])
            old = self._batches.get(kind)
            self._batches[kind] = batch if old is None else old.join(batch)

    def _count(self) -> None:
        self.num_rows = sum(len(batch.rows) for batch in self._batches.values())


def kind_of(row: Row) -> object:
    """Equal for rows that can share passes: equal in all that shapes a pass."""
    o = row.options
    shape = (o.block_size, o.schedule, o.remask, o.adaptive) if o.is_block_mode else ()
    return o.mode, shape


def _cycle(row: Row) -> Cycle:
    return CYCLES[row.options.mode]


def _groups(rows: list[Row]) -> Iterable[list[Row]]:
    """Rows of one kind whose prompts differ in length by less than a factor of two: reading them
    together, padded, costs less than twice what they cost alone.
    """
    groups: dict[tuple[object, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((kind_of(row), len(row.prompt).bit_length()), []).append(row)
    return groups.values()
