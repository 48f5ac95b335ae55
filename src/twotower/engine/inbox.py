"""Where requests wait that come while others are decoded: bounded, called off at any time."""

import threading
import time
from collections import deque
from collections.abc import Callable

from twotower.engine.events import Failed
from twotower.engine.row import Row
from twotower.engine.ticket import Ticket, failed


class Stopped(Exception):
    """The worker takes no more requests."""


class Inbox:
    """A `Line` that other threads put rows into. One lock guards all that it holds."""

    def __init__(self, max_waiting: int, idle: Callable[[], bool]) -> None:
        """idle: does a moment's work that nobody waits for; False when there is none."""
        self._idle = idle
        self._max_waiting = max_waiting
        self._waiting: deque[Row] = deque()
        self._tickets: dict[int, Ticket] = {}  # of all rows that have not ended
        self._changed = threading.Condition()
        self._ends_s: float | None = None  # when rows have to leave, in time.monotonic()
        self._reason = ""  # why no row may come any more

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_open(self) -> int:
        """Rows that have not ended, waiting or being decoded."""
        return len(self._tickets)

    def put(self, row: Row, ticket: Ticket) -> bool:
        """Let a row wait; False if too many do. Raises Stopped."""
        with self._changed:
            if self._ends_s is not None:
                raise Stopped(self._reason)
            if len(self._waiting) >= self._max_waiting:
                return False
            self._waiting.append(row)
            self._tickets[row.index] = ticket
            self._changed.notify()
            return True

    def close(self, grace_s: float, reason: str) -> None:
        """Take no more rows; those that have not ended in grace_s seconds are told to leave.

        reason: what those who come later are told.
        """
        with self._changed:
            self._reason = self._reason or reason
            self._ends_s = time.monotonic() + grace_s
            self._changed.notify()

    def ticket(self, index: int) -> Ticket | None:
        """The ticket of a row that has not ended."""
        return self._tickets.get(index)

    def forget(self, index: int) -> Ticket | None:
        """A row has ended: its ticket, for the last time."""
        with self._changed:
            return self._tickets.pop(index, None)

    def entered(self) -> list[int]:
        """Numbers of the rows that neither wait nor have ended."""
        with self._changed:
            waiting = {row.index for row in self._waiting}
            return [index for index in self._tickets if index not in waiting]

    def empty(self) -> list[int]:
        """Let nobody wait any more; the numbers of the rows that have not ended."""
        with self._changed:
            self._waiting.clear()
            return list(self._tickets)

    @property
    def is_over(self) -> bool:
        """Whether no row waits and none will come."""
        with self._changed:
            return self._ends_s is not None and not self._waiting

    def look(self, count: int) -> int:
        """How many rows wait, counted up to `count`."""
        return min(count, len(self._waiting))

    def take(self, count: int) -> list[Row]:
        """The first rows, at most `count`."""
        with self._changed:
            rows = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
            for row in rows:
                self._tickets[row.index].started_s = time.monotonic()
            return rows

    def put_back(self, rows: list[Row]) -> None:
        """Rows that could not enter are the first again."""
        with self._changed:
            self._waiting.extendleft(reversed(rows))

    def failed(self) -> list[Failed]:
        """Rows that have to leave while they wait."""
        with self._changed:
            reasons = {row.index: self.reason_to_leave(row) for row in self._waiting}
            self._waiting = deque(row for row in self._waiting if reasons[row.index] is None)
        return [reason for reason in reasons.values() if reason is not None]

    def reason_to_leave(self, row: Row) -> Failed | None:
        """Why a row is to go no further."""
        now, ticket = time.monotonic(), self._tickets[row.index]
        if self._ends_s is not None and now >= self._ends_s:
            return failed(row.index, "stopped")
        return ticket.reason_to_leave(now)

    def wait(self) -> None:
        """Sleep until a row comes or the inbox is closed, when there is no idle work left."""
        while not self._waiting and self._ends_s is None and self._idle():
            pass
        with self._changed:
            while not self._waiting and self._ends_s is None:
                self._changed.wait()
