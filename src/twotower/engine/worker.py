"""The thread that owns a model: requests come in at any time, each client gets its row's events."""

import itertools
import logging
import threading
from dataclasses import dataclass

from twotower.engine import queues
from twotower.engine.events import Event, Failed, Finished, TokensCommitted
from twotower.engine.inbox import Inbox, Stopped
from twotower.engine.options import WorkerOptions
from twotower.engine.requests import Request, check_tokenizer, make_row
from twotower.engine.ticket import Ticket
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """Too many requests wait; another try after `retry_after_s` seconds may find a place."""

    def __init__(self, max_waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"{max_waiting} requests wait already; try again in {retry_after_s} seconds"
        )
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class WorkerStats:
    """What a worker does and has done. Totals count ended and unended rows alike."""

    is_alive: bool  # whether its thread runs
    rows_waiting: int
    rows_in_flight: int
    num_finished: int
    num_failed: int
    tokens: int  # committed
    nfe: int
    context_forwards: int
    accepted_tokens: int  # of drafts, in mode="speculative"
    drafted_tokens: int
    cache_hits: int  # prompts of which the prefix cache knew a part
    cache_misses: int
    cache_saved_tokens: int  # of prompts, that were not read again
    cache_bytes: int
    cache_evictions: int


class Worker:
    """Decodes rows for clients of other threads. `start` first; `stop` at the end."""

    def __init__(
        self,
        model: TwoTower,
        tokenizer: Tokenizer | None = None,
        options: WorkerOptions | None = None,
    ) -> None:
        check_tokenizer(model, tokenizer)
        self._model, self._tokenizer = model, tokenizer
        self._options = options or WorkerOptions()
        self._inbox = Inbox(self._options.max_waiting)
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="twotower-worker", daemon=True)
        self._totals = dict.fromkeys(("num_finished", "num_failed", "tokens"), 0)

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    def stop(self, grace_s: float = 30.0) -> None:
        """Take no more requests, finish what can be finished in grace_s seconds, tell the others
        and return when the thread has ended.
        """
        self._inbox.close(grace_s)
        if self._thread.is_alive():
            self._thread.join()

    def submit(
        self, request: Request, deadline_s: float | None = None, wants_steps: bool = False
    ) -> Ticket:
        """Let a request wait for its place.

        deadline_s: seconds from now after which the row has failed. wants_steps: whether StepTaken
        events are wanted. Raises ValueError (one line) for an unusable request, QueueFull, Stopped.
        """
        index = next(self._numbers)
        row = make_row(self._model, index, request, self._tokenizer, "the prompt")
        ticket = Ticket(index, deadline_s, wants_steps)
        if not self._inbox.put(row, ticket):
            raise QueueFull(self._options.max_waiting, 1)
        return ticket

    def stats(self) -> WorkerStats:
        """Figures of this moment."""
        waiting = self._inbox.num_waiting
        return WorkerStats(
            is_alive=self._thread.is_alive(),
            rows_waiting=waiting,
            rows_in_flight=max(0, self._inbox.num_open - waiting),
            nfe=0,
            context_forwards=0,
            accepted_tokens=0,
            drafted_tokens=0,
            cache_hits=0,
            cache_misses=0,
            cache_saved_tokens=0,
            cache_bytes=0,
            cache_evictions=0,
            **self._totals,
        )

    def _run(self) -> None:
        while not self._inbox.is_over:
            try:
                for event in queues.run(self._model, self._inbox, self._options):
                    self._deliver(event)
            except Exception as error:
                _log.error("decoding failed: %s", type(error).__name__)
                _log.debug("decoding failed", exc_info=True)
                for index in self._inbox.open_rows():
                    self._deliver(
                        Failed(
                            row=index, kind="internal", message="an internal error ended the row"
                        )
                    )

    def _deliver(self, event: Event) -> None:
        if isinstance(event, TokensCommitted):
            self._totals["tokens"] += len(event.tokens)
        if not isinstance(event, Finished | Failed):
            ticket = self._inbox.ticket(event.row)
        else:
            self._totals["num_failed" if isinstance(event, Failed) else "num_finished"] += 1
            ticket = self._inbox.forget(event.row)
        if ticket is not None:
            ticket.deliver(event)


__all__ = ["QueueFull", "Stopped", "Worker", "WorkerStats"]
