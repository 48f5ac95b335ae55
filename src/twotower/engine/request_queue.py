"""Where rows wait for a slot, in the order in which they come."""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from twotower.engine.events import Failed
from twotower.engine.row import Row


class RequestQueue:
    """Rows, each of which keeps its slot to its end.

    `SourceQueue` reads them as slots become free; `SharedQueue` is for a server: other threads put
    rows in, and callers share the slots.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = list(rows)  # as they came
        self._changed = threading.Condition()

    @property
    def is_over(self) -> bool:
        """Whether no row waits and none will come."""
        return not self._rows

    def count(self, most: int) -> int:
        """How many rows wait, counted up to `most`."""
        return min(most, len(self._rows))

    def peek(self, slots: Mapping[str | None, int], is_paused: bool = False) -> Row | None:
        """The row whose turn it is; slots: of each caller; is_paused: of those that are paused."""
        rows = (row for row in self._rows if row.paused is not None or not is_paused)
        return next(rows, None)

    def take(self, row: Row) -> None:
        """A row waits no more."""
        with self._changed:
            self._rows.remove(row)
            row.num_since = 0
            row.started_s = row.started_s or time.monotonic()

    def victim(
        self, rows: Sequence[Row], waiting: Row, slots: Mapping[str | None, int]
    ) -> Row | None:
        """The one of the rows that has to make room for one that waits, if any."""
        return None

    def put_back(self, row: Row) -> None:
        """A row that has lost its slot waits again."""
        with self._changed:
            row.num_since = 0
            self._rows.append(row)

    def aborted(self, rows: Sequence[Row]) -> list[Failed]:
        """Who has to go, of rows with slots and of those that wait; called once in a step."""
        return []

    def wait(self) -> None:
        """Return when there may be something to do; called when nothing is being decoded."""
