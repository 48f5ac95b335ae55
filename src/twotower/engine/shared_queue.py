"""The queue of a server: any thread puts rows in, and callers share the slots.

While rows wait, the caller with the most slots gives some up, and a row that had one for long
makes room for one that did not.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from twotower.engine.batch import Batch, Group
from twotower.engine.events import Failed, FailureKind
from twotower.engine.faults import failed
from twotower.engine.request_queue import RequestQueue
from twotower.engine.row import Row

# A caller's rows may wait while they are fewer than so many times the free entries of the queue:
# one caller alone fills 8 of 9, and another finds room.
_SHARE = 8
# A row makes room for another of its caller, or of one with fewer slots, after this many steps and
# twice as many as the other has had more than it has waited: new rows begin soon, old ones change
# slots rarely, and nobody waits for ever.
TURN = 8


class Stopped(Exception):
    """The engine takes no more requests."""


class SharedQueue(RequestQueue):
    """Rows that wait, new ones and paused ones. Any thread may `put`, up to max_waiting rows; the
    engine's takes.

    idle: does a moment's work that nobody waits for; False when there is none.
    """

    def __init__(
        self,
        rows: Iterable[Row] = (),
        max_waiting: int = 0,
        idle: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(rows)
        self._max_waiting, self._idle = max_waiting, idle
        self._is_closed = max_waiting == 0  # no more rows come
        self._ends_s = float("inf")  # when rows have to leave, in time.monotonic()
        self._reason = ""  # why no row may come any more

    @property
    def num_waiting(self) -> int:
        """Rows that never had a slot."""
        return sum(row not in self.paused for row in self._rows)

    @property
    def is_over(self) -> bool:
        """Whether no row waits and none will come."""
        with self._changed:
            return self._is_closed and not self._rows

    def put(self, row: Row) -> bool:
        """Let a row wait; False if too many do. Raises Stopped."""
        with self._changed:
            if self._is_closed:
                raise Stopped(self._reason)
            free = self._max_waiting - self.num_waiting
            own = sum(one.caller == row.caller and one not in self.paused for one in self._rows)
            if free <= 0 or (row.caller is not None and own >= _SHARE * free):
                return False
            self._rows.append(row)
            self._changed.notify()
            return True

    def holds(self, row: Row) -> bool:
        """Whether a row waits here."""
        with self._changed:
            return any(one is row for one in self._rows)

    def close(self, grace_s: float, reason: str) -> None:
        """Take no more rows; those that have not ended in grace_s seconds have to leave.

        reason: the message for later requests.
        """
        with self._changed:
            self._reason = self._reason or reason
            self._ends_s, self._is_closed = time.monotonic() + grace_s, True
            self._changed.notify()

    def clear(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._rows.clear()
            self.paused.clear()

    def peek(self, slots: Mapping[str | None, int], is_paused: bool = False) -> Row | None:
        """Of the caller with the fewest slots, then the row that was served least for its time of
        waiting, then the first.
        """
        with self._changed:
            rows = [row for row in self._rows if row in self.paused or not is_paused]
            rows = [row for row in rows if row not in self.paused or row.num_since]  # not of now
            return min(rows, key=lambda row: (slots[row.caller], _debt(row)), default=None)

    def make_room(self, row: Row, slots: Counter[str | None], group: Group) -> bool:
        """Let another wait with all that was read of it, of those that do not enter just now."""
        victim = self._victim([one for one in group.rows if one.num_since], row, slots)
        if victim is None:
            return False
        slots[victim.caller] -= 1
        self.put_back(victim, group.remove(victim))
        return True

    def put_back(self, row: Row, known: Batch) -> None:
        """A row that has lost its slot waits again, with all that was read of it."""
        known.denoiser = None  # it goes on with the others
        with self._changed:
            row.num_since = 0
            self.paused[row] = known
            self._rows.append(row)

    def _victim(
        self, rows: Sequence[Row], waiting: Row, slots: Mapping[str | None, int]
    ) -> Row | None:
        """A row of a caller with more slots, or one of its own caller's, if it has one."""
        own, caller = slots[waiting.caller], waiting.caller
        peers = [row for row in rows if row.caller == caller] if caller is not None else []
        others = [row for row in rows if slots[row.caller] > own]
        victim = max(
            [*others, *peers],
            key=lambda row: (slots[row.caller], row.num_since >= TURN, row.num_served),
            default=None,
        )
        if victim is None:
            return None
        has_more = slots[victim.caller] > own + 1
        has_turned = victim.num_since >= TURN  # a slot that was waited for is not lost at once
        was_longer = victim.num_served >= TURN + 2 * max(0, _debt(waiting))
        return victim if has_more or (has_turned and was_longer) else None

    def aborted(self, rows: Sequence[Row]) -> list[Failed]:
        """Rows that were cancelled or are too late; the others have waited, or been served, for one
        more step.
        """
        now = time.monotonic()
        with self._changed:
            for row in (*self._rows, *rows):
                row.num_since += 1
            for row in rows:
                row.num_served += 1
            reasons = [(row, self.abort_reason(row, now)) for row in (*self._rows, *rows)]
            gone = {row for row, reason in reasons if reason is not None}
            self._rows = [row for row in self._rows if row not in gone]
            self.paused = {row: own for row, own in self.paused.items() if row not in gone}
        return [failed(row.index, reason) for row, reason in reasons if reason]

    def abort_reason(self, row: Row, now: float) -> FailureKind | None:
        """Why a row is to go no further at the time now, in seconds of time.monotonic()."""
        if now >= self._ends_s:
            return "stopped"
        return row.abort_reason(now)

    def wait(self) -> None:
        """Return when there may be something to do; called when nothing is being decoded."""
        while not self._rows and not self._is_closed and self._idle():
            pass
        with self._changed:
            while not self._rows and not self._is_closed:
                self._changed.wait()


def _debt(row: Row) -> int:
    """What a waiting row has had of the machine, less what it has waited since: whoever waits long
    enough comes before every new row.
    """
    return row.num_served - row.num_since
