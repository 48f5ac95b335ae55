"""What a client holds while its row is decoded: its events, and the right to call it off."""

import asyncio
import contextlib
import math
import queue
import time
from collections.abc import AsyncGenerator, Callable, Generator

from twotower.engine.events import Event, Failed, FailureKind, Finished, StepTaken
from twotower.engine.row import Row

_MESSAGES: dict[FailureKind, str] = {
    "cancelled": "the request was cancelled",
    "deadline": "the request took longer than its deadline allows; allow more time or less text",
    "stopped": "the server is stopping; send the request again later",
}


class Ticket:
    """One submitted row. Its events are read once, by `events` or by `aevents`.

    The last event is Finished or Failed. Leaving either iterator before it cancels the row.
    """

    def __init__(self, row: Row, deadline_s: float | None, wants_steps: bool) -> None:
        self.index = row.index  # `row` of its events
        self.prompt = row.prompt
        self.nfe = self.context_forwards = 0  # as far as the worker has counted them
        self.submitted_s = time.monotonic()
        self.started_s: float | None = None  # when it had its place, last
        self._deadline = math.inf if deadline_s is None else self.submitted_s + deadline_s
        self._wants_steps = wants_steps
        self._is_cancelled = False
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Let the row leave within one cycle, with Failed(kind="cancelled") as its last event."""
        self._is_cancelled = True

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
        self._wake = lambda: _call_in(loop, arrived.set)
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

    def reason_to_leave(self, now: float) -> Failed | None:
        """Why the row must not go on at the time now, in seconds of time.monotonic()."""
        if self._is_cancelled:
            return failed(self.index, "cancelled")
        return failed(self.index, "deadline") if now >= self._deadline else None


def failed(index: int, kind: FailureKind) -> Failed:
    """The last event of a row that ends from outside."""
    return Failed(row=index, kind=kind, message=_MESSAGES[kind])


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call the function in the loop's thread; a loop that is closed has no one left to tell."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
