"""Where rows wait for a place, in the order that is fair to their callers."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from twotower.engine.events import Failed, FailureKind
from twotower.engine.faults import failed
from twotower.engine.request import Row

_IDLE_S = 0.01  # between two questions to a source that has nothing at present
# A caller's rows may wait while they are fewer than so many times the free places of the queue: one
# caller alone fills 8 of 9, and another finds room.
_SHARE = 8


def debt(row: Row) -> int:
    """What a waiting row has had of the machine, less what it has waited since: whoever waits long
    enough comes before every new row.
    """
    return row.num_served - row.num_since


class Stopped(Exception):
    """The engine takes no more requests."""


class RequestQueue:
    """Rows that wait, new ones and paused ones. Any thread may `put`; the engine's takes.

    With a source there is no `put`: its rows are read as places become free, no further than
    needed. None of a source means nothing at present; it is asked again after a cycle, or a moment
    later. idle: does a moment's work that nobody waits for; False when there is none.
    """

    def __init__(
        self,
        source: Iterable[Row | Failed | None] = (),
        max_waiting: int = 0,
        idle: Callable[[], bool] = lambda: False,
    ) -> None:
        self._source, self._is_exhausted = iter(source), False
        self._max_waiting, self._idle = max_waiting, idle
        self._rows: list[Row] = []  # as they came
        self._failed: list[Failed] = []  # of the source
        self._changed = threading.Condition()
        # When rows have to leave, in time.monotonic(); none while others may put some.
        self._ends_s: float | None = None if max_waiting else float("inf")
        self._reason = ""  # why no row may come any more

    @property
    def num_waiting(self) -> int:
        """Rows that never had a place."""
        return sum(row.paused is None for row in self._rows)

    @property
    def is_over(self) -> bool:
        """Whether no row waits and none will come."""
        with self._changed:
            is_closed = self._ends_s is not None and self._is_exhausted
            return is_closed and not self._rows and not self._failed

    def put(self, row: Row) -> bool:
        """Let a row wait; False if too many do. Raises Stopped."""
        with self._changed:
            if self._ends_s is not None:
                raise Stopped(self._reason)
            free = self._max_waiting - self.num_waiting
            own = sum(one.caller == row.caller and one.paused is None for one in self._rows)
            if free <= 0 or (row.caller is not None and own >= _SHARE * free):
                return False
            self._rows.append(row)
            self._changed.notify()
            return True

    def holds(self, row: Row) -> bool:
        """Whether a row waits here."""
        with self._changed:
            return any(one is row for one in self._rows)

    def put_back(self, row: Row) -> None:
        """A row that has lost its place waits again."""
        with self._changed:
            row.num_since = 0
            self._rows.append(row)

    def close(self, grace_s: float, reason: str) -> None:
        """Take no more rows; those that have not ended in grace_s seconds have to leave.

        reason: the message for later requests.
        """
        with self._changed:
            self._reason = self._reason or reason
            self._ends_s = time.monotonic() + grace_s
            self._changed.notify()

    def clear(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._rows.clear()

    def count(self, most: int) -> int:
        """How many rows wait, counted up to `most`."""
        with self._changed:
            while len(self._rows) < most and not self._is_exhausted:
                try:
                    row = next(self._source)
                except StopIteration:
                    self._is_exhausted = True
                    break
                if row is None:
                    break
                if isinstance(row, Failed):
                    self._failed.append(row)
                else:
                    self._rows.append(row)
            return min(most, len(self._rows))

    def peek(self, places: Mapping[str | None, int], is_paused: bool = False) -> Row | None:
        """The row whose turn it is: of the caller with the fewest places, then the row that was
        served least for its time of waiting, then the first. is_paused: of those that are paused
        alone.
        """
        with self._changed:
            rows = [row for row in self._rows if row.paused is not None or not is_paused]
            return min(rows, key=lambda row: (places[row.caller], debt(row)), default=None)

    def take(self, row: Row) -> None:
        """A row waits no more."""
        with self._changed:
            self._rows.remove(row)
            row.num_since = 0
            row.started_s = row.started_s or time.monotonic()

    def leaving(self, now: float) -> list[Failed]:
        """Rows that have to leave while they wait, and those of the source that cannot begin; the
        others have waited for one more step.
        """
        with self._changed:
            for row in self._rows:
                row.num_since += 1
            reasons = [(row, self.reason_to_leave(row, now)) for row in self._rows]
            self._rows = [row for row, reason in reasons if reason is None]
            ended, self._failed = self._failed, []
        return [*ended, *(failed(row.index, reason) for row, reason in reasons if reason)]

    def reason_to_leave(self, row: Row, now: float) -> FailureKind | None:
        """Why a row is to go no further at the time now, in seconds of time.monotonic()."""
        if self._ends_s is not None and now >= self._ends_s:
            return "stopped"
        return row.reason_to_leave(now)

    def wait(self) -> None:
        """Return when there may be something to do; called when nothing is being decoded."""
        if not self._is_exhausted and not self._rows:
            time.sleep(_IDLE_S)  # an iterator cannot tell when it will have something
        while not self._rows and self._ends_s is None and self._idle():
            pass
        with self._changed:
            while not self._rows and self._ends_s is None:
                self._changed.wait()
