"""Rows that wait for a slot."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from twotower.engine.batch import Batch, Group
from twotower.engine.events import Failed
from twotower.engine.row import Row


class RequestQueue:
    """Rows that wait for a slot, in the order in which they come; each keeps its slot to its end.
    `SourceQueue` reads them as slots become free; in a `SharedQueue` callers share the slots.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = list(rows)  # as they came
        self.paused: dict[Row, Batch] = {}  # of these, all that was read of those that had a slot
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
        return next((row for row in self._rows if row in self.paused or not is_paused), None)

    def take(self, row: Row) -> Batch | None:
        """A row waits no more; returns all that was read of it, if it has had a slot."""
        with self._changed:
            self._rows.remove(row)
            row.num_since = 0
            row.started_s = row.started_s or time.monotonic()
            return self.paused.pop(row, None)

    def make_room(self, row: Row, slots: Counter[str | None], group: Group) -> bool:
        """Whether another row of the group has lost its slot to this one."""
        return False

    def aborted(self, rows: Sequence[Row]) -> list[Failed]:
        """Who has to go, of rows with slots and of those that wait; called once in a step."""
        return []

    def wait(self) -> None:
        """Return when there may be something to do; called when nothing is being decoded."""
