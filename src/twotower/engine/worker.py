"""The thread that owns a model: requests come in at any time, each client gets its row's events."""

import dataclasses
import itertools
import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass

from twotower.engine import queues
from twotower.engine.events import Event, Failed, Finished, StepTaken, TokensCommitted
from twotower.engine.faults import HopelessError, internal_failure, log_failure
from twotower.engine.inbox import Inbox, Stopped
from twotower.engine.options import WorkerOptions
from twotower.engine.prefix_cache import PrefixCache, PrefixStats
from twotower.engine.requests import Request, check_tokenizer, make_row
from twotower.engine.ticket import Ticket, failed
from twotower.measure import give_back_memory
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

_LONGEST_RETRY_S = 60
_HOPELESS = "nothing can be decoded any more; the server has to be started again"
_MOST_UNREAD = 64  # ended texts that wait for an idle moment
_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """Too many requests wait; another try after `retry_after_s` seconds may find a place."""

    def __init__(self, max_waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"{max_waiting} requests wait already; try again in {retry_after_s} seconds"
        )
        self.max_waiting = max_waiting
        self.retry_after_s = retry_after_s


@dataclass(kw_only=True)
class _Totals:
    num_finished: int = 0
    num_failed: int = 0
    tokens: int = 0
    nfe: int = 0
    context_forwards: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkerStats:
    """What a worker does and has done. Totals count the rows that have not ended, too."""

    is_alive: bool  # whether its thread runs
    rows_waiting: int
    rows_in_flight: int
    num_finished: int
    num_failed: int  # cancelled ones included
    tokens: int  # given out
    nfe: int
    context_forwards: int
    drafted_tokens: int  # that the context tower read, in mode="speculative"
    accepted_tokens: int  # and those of them that stood
    cache_hits: int  # prompts of which the prefix cache knew a part
    cache_misses: int
    cache_saved_tokens: int  # of prompts, that were not read again
    cache_bytes: int
    cache_evictions: int


class Worker:
    """Decodes rows for clients of other threads. `start` first; `stop` at the end.

    An error ends the rows that it concerns and never the thread, but for a HopelessError: then all
    rows are told and no more are taken. The log names no text.
    """

    def __init__(
        self,
        model: TwoTower,
        tokenizer: Tokenizer | None = None,
        options: WorkerOptions | None = None,
    ) -> None:
        check_tokenizer(model, tokenizer)
        self._model, self._tokenizer = model, tokenizer
        self._options = options or WorkerOptions()
        self._inbox = Inbox(self._options.max_waiting, self._read_an_ended_text)
        self._prefixes: PrefixCache | None = None
        if self._options.prefix_cache_bytes:
            self._prefixes = PrefixCache(model, self._options.prefix_cache_bytes)
        self._unread: deque[list[int]] = deque(maxlen=_MOST_UNREAD)
        self._numbers = itertools.count()
        self._newest_end: tuple[Ticket, Event] | None = None
        self.is_hopeless = False  # nothing can be decoded any more; a new worker is needed
        self._thread = self._make_thread()
        self._totals = _Totals()
        self._seconds_between_ends = 1.0  # of rows; a running mean
        self._last_end_s = time.monotonic()

    def start(self) -> None:
        """Begin to decode. After the thread has died: go on with the rows that waited."""
        if self._thread.ident is not None and not self._thread.is_alive():
            # A new thread may allocate elsewhere, beside what the old one's prefix cache had.
            give_back_memory()
            self._thread = self._make_thread()
        self._thread.start()

    def _make_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="twotower-worker", daemon=True)

    def stop(self, grace_s: float = 30.0) -> None:
        """Take no more requests, finish what can be finished in grace_s seconds, tell the others
        and return when the thread has ended.
        """
        self._inbox.close(grace_s, "the server is stopping")
        if self._thread.is_alive():
            self._thread.join()
        for index in self._inbox.empty():  # of a worker that was never started
            self._deliver(failed(index, "stopped"))

    def submit(
        self, request: Request, deadline_s: float | None = None, wants_steps: bool = False
    ) -> Ticket:
        """Let a request wait for its place.

        deadline_s: seconds from now after which the row has failed. wants_steps: whether StepTaken
        events are wanted. Raises ValueError (one line) for an unusable request, QueueFull, Stopped.
        """
        index = next(self._numbers)
        row = make_row(self._model, index, request, self._tokenizer, "the prompt")
        ticket = Ticket(row, deadline_s, wants_steps)
        if not self._inbox.put(row, ticket):
            num_waiting = self._options.max_waiting
            # By then about half of those who wait now have their place.
            retry_after_s = math.ceil(self._seconds_between_ends * num_waiting / 2)
            raise QueueFull(num_waiting, min(max(retry_after_s, 1), _LONGEST_RETRY_S))
        return ticket

    def stats(self) -> WorkerStats:
        """Figures of this moment."""
        waiting = self._inbox.num_waiting
        return WorkerStats(
            is_alive=self._thread.is_alive(),
            rows_waiting=waiting,
            rows_in_flight=max(0, self._inbox.num_open - waiting),
            **dataclasses.asdict(self._totals),
            **dataclasses.asdict(PrefixStats() if self._prefixes is None else self._prefixes.stats),
        )

    def _run(self) -> None:
        try:
            self._decode()
        except HopelessError as error:
            self._give_up(error)
        except BaseException as error:
            # Somebody ends the thread (SystemExit raised in it): its rows are lost and told so.
            cause = RuntimeError(f"the decoding thread was ended by {type(error).__name__}")
            cause.with_traceback(error.__traceback__)
            if self._newest_end is not None:  # it may have been counted and not told
                self._newest_end[0].deliver(self._newest_end[1])
            for index in self._inbox.entered():
                self._deliver(internal_failure(index, cause))
            if self._prefixes is not None:  # it may have been cut off in the middle of a change
                self._prefixes = PrefixCache(self._model, self._options.prefix_cache_bytes)

    def _give_up(self, error: HopelessError) -> None:
        _log.error("decoding has ended for good: %s", error)
        self.is_hopeless = True
        self._inbox.close(0.0, _HOPELESS)
        for index in self._inbox.empty():
            self._deliver(Failed(row=index, kind="stopped", message=_HOPELESS))

    def _decode(self) -> None:
        while not self._inbox.is_over:
            try:
                for event in queues.run(self._model, self._inbox, self._options, self._prefixes):
                    self._deliver(event)
            except HopelessError:
                raise
            except Exception as error:  # ours; those of a row's own work do not come this far
                for index in self._inbox.entered():
                    self._deliver(internal_failure(index, error))

    def _deliver(self, event: Event) -> None:
        """Count an event and hand it to its client."""
        ticket = self._inbox.ticket(event.row)
        if ticket is None:
            return
        if isinstance(event, Failed):
            log_failure(event)
            # An exception holds on to all that its pass had in memory.
            event = dataclasses.replace(event, error=None)
        if isinstance(event, Finished | Failed):
            self._newest_end = ticket, event
            self._inbox.forget(event.row)
            self._note_end(event, ticket)
        self._add(event, ticket)
        ticket.deliver(event)

    def _add(self, event: Event, ticket: Ticket) -> None:
        totals = self._totals
        if isinstance(event, Failed | StepTaken):
            return
        now = event.completion if isinstance(event, Finished) else event
        totals.nfe += now.nfe - ticket.nfe
        totals.context_forwards += now.context_forwards - ticket.context_forwards
        ticket.nfe, ticket.context_forwards = now.nfe, now.context_forwards
        if isinstance(event, TokensCommitted):
            totals.tokens += len(event.tokens)
            totals.drafted_tokens += event.drafted or 0
            totals.accepted_tokens += event.accepted or 0

    def _note_end(self, event: Finished | Failed, ticket: Ticket) -> None:
        if isinstance(event, Failed):
            self._totals.num_failed += 1
            return
        self._totals.num_finished += 1
        now = time.monotonic()
        since = now - max(self._last_end_s, ticket.submitted_s)  # idle time is no sign of load
        self._seconds_between_ends += 0.1 * (since - self._seconds_between_ends)
        self._last_end_s = now
        if self._prefixes is not None:
            self._unread.append([*ticket.prompt, *event.completion.tokens])

    def _read_an_ended_text(self) -> bool:
        """Read a piece of an ended row's text, for a prompt that goes on from it.

        What a row wrote was read in other pieces than a prompt's, and contexts of those differ in
        the last bits. So it costs a second reading, for which no row should wait.
        """
        if not self._unread:
            return False
        assert self._prefixes is not None
        text = self._unread.pop()  # the newest
        try:
            if next(self._prefixes.remember(text), self) is not self:
                self._unread.append(text)
        except Exception as error:
            log_failure(internal_failure(-1, error))
        return True


__all__ = ["QueueFull", "Stopped", "Worker", "WorkerStats"]
