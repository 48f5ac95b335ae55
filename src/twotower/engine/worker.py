"""The thread that owns a model: requests come in at any time, each client gets its row's events."""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass

from twotower.engine.events import Event, Failed, Finished, StepTaken
from twotower.engine.faults import EngineDeadError, failed, log_failure
from twotower.engine.lookup_cache import LookupCache
from twotower.engine.options import EngineOptions
from twotower.engine.prefix_cache import PrefixCache, PrefixStats
from twotower.engine.request import Request, checked_engine, make_row
from twotower.engine.row import Row
from twotower.engine.scheduler import Scheduler
from twotower.engine.shared_queue import SharedQueue
from twotower.memory import release_memory
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

_LONGEST_RETRY_S = 60
_DEAD = "nothing can be decoded any more; the server has to be started again"
_MAX_UNREAD = 64  # ended texts that wait for an idle moment
_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """Too many requests wait; another try after `retry_after_s` seconds may find a slot."""

    def __init__(self, num_waiting: int, max_waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"{num_waiting} requests wait already; try again in {retry_after_s} seconds"
        )
        self.max_waiting = max_waiting
        self.retry_after_s = retry_after_s


class Ticket:
    """What a client holds of its row. Its events are read once, by `events` or by `aevents`.

    The last event is Finished or Failed. Leaving either iterator before it cancels the row.
    """

    def __init__(self, row: Row, wants_steps: bool) -> None:
        self.row = row
        self._wants_steps = wants_steps
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Let the row leave within one cycle, with Failed(kind="cancelled") as its last event."""
        self.row.is_cancelled = True

    def events(self) -> Generator[Event, None, None]:
        """The row's events as they happen; blocks between them."""
        event: Event | None = None
        try:
            while not isinstance(event, Finished | Failed):
                event = self._events.get()
                yield event
        finally:
            self.cancel()

    async def aevents(self) -> AsyncGenerator[Event, None]:
        """`events` for an event loop, which goes on between them."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: call_in(loop, arrived.set)
        event: Event | None = None
        try:
            while not isinstance(event, Finished | Failed):
                arrived.clear()  # before looking: an event that comes now is not missed
                while self._events.empty():
                    await arrived.wait()
                    arrived.clear()
                event = self._events.get()
                yield event
        finally:
            self.cancel()

    def deliver(self, event: Event) -> None:
        """Hand over an event; called by the thread that decodes."""
        if isinstance(event, StepTaken) and not self._wants_steps:
            return
        self._events.put(event)
        if self._wake is not None:
            self._wake()


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call the function in the loop's thread; a loop that is closed has no one left to tell."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


@dataclass(kw_only=True)
class Totals:
    """What a worker has done, the rows that have not ended included."""

    num_finished: int = 0
    num_failed: int = 0  # cancelled ones included
    tokens: int = 0  # given out
    nfe: int = 0
    context_forwards: int = 0
    drafted_tokens: int = 0  # that the context tower verified, in mode="speculative"
    accepted_tokens: int = 0  # and those of them that it accepted
    lookup_tokens: int = 0  # of these, those from lookups

    def add(self, row: Row) -> None:
        """Count what a row has cost and given."""
        self.tokens += row.num_released
        self.nfe += row.nfe
        self.context_forwards += row.context_forwards
        self.drafted_tokens += row.num_drafted
        self.accepted_tokens += row.num_accepted
        self.lookup_tokens += row.accepted_of["lookup"]


@dataclass(kw_only=True)
class WorkerStats(Totals, PrefixStats):
    """Figures of a moment."""

    is_alive: bool  # whether its thread runs
    rows_waiting: int
    rows_in_flight: int


class Worker:
    """Decodes rows for clients of other threads. `start` first; `stop` at the end.

    An error ends the rows that it concerns and never the thread, but for an EngineDeadError: then
    all rows fail and no more are accepted. The log names no text.
    """

    def __init__(
        self,
        model: TwoTower,
        tokenizer: Tokenizer | None = None,
        engine: EngineOptions | None = None,
    ) -> None:
        self._options = checked_engine(model, tokenizer, engine)
        self._model, self._tokenizer = model, tokenizer
        self._queue = SharedQueue((), self._options.max_waiting, self._read_an_ended_text)
        self._tickets: dict[int, Ticket] = {}  # of all rows that have not ended
        self._prefixes: PrefixCache | None = None
        if self._options.prefix_cache_bytes:
            self._prefixes = PrefixCache(model, self._options.prefix_cache_bytes)
        self._learnt: LookupCache | None = None
        if self._options.lookup_cache_bytes:
            self._learnt = LookupCache(self._options.lookup_cache_bytes)
        self._unread: deque[list[int]] = deque(maxlen=_MAX_UNREAD)
        self._numbers = itertools.count()
        self._newest_end: tuple[Ticket, Event] | None = None
        self.is_dead = False  # nothing can be decoded any more; a new worker is needed
        self._thread = self._make_thread()
        self._totals, self._counting = Totals(), threading.Lock()  # so that no row counts twice
        self._seconds_between_ends = 1.0  # of rows; a running mean
        self._last_end_s = time.monotonic()

    def start(self) -> None:
        """Begin to decode. After the thread has died: go on with the rows that waited."""
        if self._thread.ident is not None and not self._thread.is_alive():
            # A new thread may allocate elsewhere, beside what the old one's prefix cache had.
            release_memory()
            self._thread = self._make_thread()
        self._thread.start()

    def _make_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="twotower-worker", daemon=True)

    def stop(self, grace_s: float = 30.0) -> None:
        """Take no more requests, finish what can be finished in grace_s seconds, fail the others
        and return when the thread has ended.
        """
        self._queue.close(grace_s, "the server is stopping")
        if self._thread.is_alive():
            self._thread.join()
        self._queue.clear()
        for index in list(self._tickets):  # of a worker that was never started
            self._deliver(failed(index, "stopped"))

    def submit(
        self, request: Request, deadline_s: float | None = None, wants_steps: bool = False
    ) -> Ticket:
        """Let a request wait for its slot.

        deadline_s: seconds from now after which the row has failed. wants_steps: whether StepTaken
        events are wanted. Raises ValueError (one line) for an unusable request, QueueFull, Stopped.
        """
        row = make_row(self._model, next(self._numbers), request, self._tokenizer, "the prompt")
        if deadline_s is not None:
            row.deadline_s = row.submitted_s + deadline_s
        ticket = self._tickets[row.index] = Ticket(row, wants_steps)
        is_waiting = False
        try:
            is_waiting = self._queue.put(row)
        finally:
            if not is_waiting:
                del self._tickets[row.index]
        if not is_waiting:
            num_waiting, most = self._queue.num_waiting, self._options.max_waiting
            # By then about half of those who wait now have their slot.
            retry_after_s = math.ceil(self._seconds_between_ends * num_waiting / 2)
            raise QueueFull(num_waiting, most, min(max(retry_after_s, 1), _LONGEST_RETRY_S))
        return ticket

    def stats(self) -> WorkerStats:
        """Figures of this moment."""
        with self._counting:
            open_rows = [ticket.row for ticket in list(self._tickets.values())]
            totals = dataclasses.replace(self._totals)
        for row in open_rows:
            totals.add(row)
        waiting = self._queue.num_waiting
        return WorkerStats(
            is_alive=self._thread.is_alive(),
            rows_waiting=waiting,
            rows_in_flight=max(0, len(open_rows) - waiting),
            **vars(totals),
            **vars(PrefixStats() if self._prefixes is None else self._prefixes.stats),
        )

    def _run(self) -> None:
        try:
            self._decode()
        except EngineDeadError as error:
            self._give_up(error)
        except BaseException as error:
            # Somebody ends the thread (SystemExit raised in it): its rows are lost and fail.
            cause = RuntimeError(f"the decoding thread was ended by {type(error).__name__}")
            cause.with_traceback(error.__traceback__)
            if self._newest_end is not None:  # it may have been counted and not delivered
                self._newest_end[0].deliver(self._newest_end[1])
            self._fail_rows(cause)
            # It holds this frame, and the frame would hold it: batches and cached prefixes would
            # stay until the garbage collector comes.
            del cause
            if self._prefixes is not None:  # it may have been cut off in the middle of a change
                self._prefixes = PrefixCache(self._model, self._options.prefix_cache_bytes)

    def _give_up(self, error: EngineDeadError) -> None:
        _log.error("decoding has ended for good: %s", error)
        self.is_dead = True
        self._queue.close(0.0, _DEAD)
        self._queue.clear()
        for index in list(self._tickets):
            self._deliver(Failed(row=index, kind="stopped", message=_DEAD))

    def _decode(self) -> None:
        while not self._queue.is_over:
            kept = self._prefixes, self._learnt
            scheduler = Scheduler(self._model, self._queue, self._options, *kept)
            try:
                for event in scheduler.run():
                    self._deliver(event)
            except EngineDeadError:
                raise
            except Exception as error:  # ours; those of a row's own work do not come this far
                self._fail_rows(error)

    def _fail_rows(self, error: Exception) -> None:
        """End the rows that have had a slot and do not wait in the queue: also those that were
        about to get one again or to lose it, whom nobody else would find.
        """
        for index, ticket in list(self._tickets.items()):
            if ticket.row.started_s is not None and not self._queue.holds(ticket.row):
                self._deliver(failed(index, "internal", error))

    def _deliver(self, event: Event) -> None:
        """Count an event and hand it to its client."""
        ticket = self._tickets.get(event.row)
        if ticket is None:
            return
        if isinstance(event, Failed):
            log_failure(event)
            # An exception holds on to all that its pass had in memory.
            event = dataclasses.replace(event, error=None)
        if isinstance(event, Finished | Failed):
            self._newest_end = ticket, event
            with self._counting:
                self._totals.add(ticket.row)
                del self._tickets[event.row]
            self._note_end(event, ticket)
        ticket.deliver(event)

    def _note_end(self, event: Finished | Failed, ticket: Ticket) -> None:
        if isinstance(event, Failed):
            self._totals.num_failed += 1
            return
        self._totals.num_finished += 1
        now = time.monotonic()
        since = now - max(self._last_end_s, ticket.row.submitted_s)  # idle time is no sign of load
        self._seconds_between_ends += 0.1 * (since - self._seconds_between_ends)
        self._last_end_s = now
        if self._prefixes is not None:
            self._unread.append([*ticket.row.prompt, *event.completion.tokens])

    def _read_an_ended_text(self) -> bool:
        """Read a piece of an ended row's text, for a prompt that goes on from it.

        What a row wrote was read in other pieces than a prompt's, and contexts of those differ in
        the last bits. So it costs a second prefill, for which no row should wait.
        """
        if not self._unread:
            return False
        assert self._prefixes is not None
        text = self._unread.pop()  # the newest
        try:
            if next(self._prefixes.remember(text), self) is not self:
                self._unread.append(text)
        except Exception as error:
            log_failure(failed(-1, "internal", error))
        return True
