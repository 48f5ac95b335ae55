"""Where rows wait for a place, in the order in which they come."""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from twotower.engine.events import Failed
from twotower.engine.request import Row

_IDLE_S = 0.01  # between two questions to a source that has nothing at present


class RequestQueue:
    """Rows of a source, which are read as places become free, no further than needed.

    None of a source means nothing at present; it is asked again after a cycle, or a moment later.
    `SharedQueue` is for a server: other threads put rows in, and callers share the places.
    """

    def __init__(self, source: Iterable[Row | Failed | None] = ()) -> None:
        self._source, self._is_exhausted = iter(source), False
        self._rows: list[Row] = []  # as they came
        self._failed: list[Failed] = []  # of the source
        self._changed = threading.Condition()
        self._is_closed = True  # no rows come but those of the source

    @property
    def is_over(self) -> bool:
        """Whether no row waits and none will come."""
        with self._changed:
            return self._is_closed and self._is_exhausted and not self._rows and not self._failed

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
        """The row whose turn it is; places: how many each caller has. is_paused: of those that are
        paused alone.
        """
        with self._changed:
            rows = (row for row in self._rows if row.paused is not None or not is_paused)
            return next(rows, None)

    def take(self, row: Row) -> None:
        """A row waits no more."""
        with self._changed:
            self._rows.remove(row)
            row.num_since = 0
            row.started_s = row.started_s or time.monotonic()

    def victim(
        self, rows: Sequence[Row], waiting: Row, places: Mapping[str | None, int]
    ) -> Row | None:
        """The one of the rows that has to make room for one that waits, if any."""
        return None

    def put_back(self, row: Row) -> None:
        """A row that has lost its place waits again."""
        with self._changed:
            row.num_since = 0
            self._rows.append(row)

    def leaving(self, rows: Sequence[Row]) -> list[Failed]:
        """Who has to go, of the rows, which have places, and of those that wait; called once in a
        step.
        """
        ended, self._failed = self._failed, []
        return ended

    def wait(self) -> None:
        """Return when there may be something to do; called when nothing is being decoded."""
        if not self._is_exhausted and not self._rows:
            time.sleep(_IDLE_S)  # an iterator cannot tell when it will have something
