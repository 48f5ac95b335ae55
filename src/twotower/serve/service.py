"""The worker behind the routes: kept alive, brought to an end, asked for rows.

The rows of one HTTP request are submitted together, read together, cancelled together.
"""

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

from starlette.types import Receive

from twotower.engine import (
    Completion,
    Event,
    Failed,
    Finished,
    QueueFull,
    StepTaken,
    Stopped,
    Ticket,
    TokensCommitted,
    Worker,
)
from twotower.engine.faults import failed
from twotower.engine.filters import Filter, function_filter, pattern_filter
from twotower.engine.grammar_builder import BUILD_S, Built, GrammarsFull, build, find
from twotower.engine.worker import call_in
from twotower.serve.answers import NOTHING, Shape, usage_of
from twotower.serve.errors import ApiError, bad_value, from_failure
from twotower.serve.metrics import Metrics, Observed
from twotower.serve.options import ServeOptions
from twotower.serve.pieces import Scores
from twotower.serve.requests import Generation, Reader, Served
from twotower.serve.viewer import Viewer

_log = logging.getLogger("twotower.serve")
_BUILDING = 8  # callers whose grammars are built or wait for it
_WATCH_S = 0.25  # how often the worker's thread is looked at
_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def read_filters(named: Sequence[str]) -> tuple[Filter, ...]:
    """A filter for each pattern or module:function (a pattern of that form is spelt with [:])."""
    return tuple(
        function_filter(name) if _ENTRY_POINT.fullmatch(name) else pattern_filter(name)
        for name in named
    )


class Service:
    """A worker with its options, its model's description and its figures."""

    def __init__(
        self, worker: Worker, options: ServeOptions, served: Served, metrics: Metrics
    ) -> None:
        """ValueError (one line) for a bad filter."""
        self.worker, self.options, self.served, self.metrics = worker, options, served, metrics
        self.reader = Reader(served, options, read_filters(options.filter))
        self.is_stopping = False
        # Of their own, so that a grammar made to be slow keeps no request waiting that has none.
        self._building = ThreadPoolExecutor(_BUILDING, "twotower-grammar")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def state(self) -> str:
        """Whether a request would be decoded now: ready, or why not; failed is for good."""
        if self.is_stopping:
            return "stopping"
        if self.worker.is_dead:
            return "failed"
        return "ready" if self.worker.stats().is_alive else "restarting"

    async def build(self, asked: Generation) -> Built | None:
        """Its grammar made ready, one at a time for each caller; to be held until it is submitted.
        ApiError for one that cannot be built by the deadline.
        """
        if asked.grammar is None:
            return None
        grammar, tokenizer = asked.grammar, self.served.tokenizer
        if (known := find(grammar, tokenizer)) is not None:
            return known
        turn = self._turns.setdefault(asked.caller, asyncio.Lock())
        try:
            await asyncio.wait_for(turn.acquire(), asked.seconds_left)
        except TimeoutError:
            raise from_failure(failed(-1, "deadline")) from None
        most_s = min(BUILD_S, asked.seconds_left)
        building = self._building.submit(build, grammar, tokenizer, most_s)
        loop = asyncio.get_running_loop()
        # Not when we are cancelled: the thread goes on until then.
        building.add_done_callback(lambda _: call_in(loop, turn.release))
        try:
            return await asyncio.wrap_future(building)
        except ValueError as error:
            raise refused(error) from None

    async def stop(self) -> None:
        """Take no more requests; finish or tell every row; return when that is done."""
        if not self.is_stopping:
            self.is_stopping = True
            await asyncio.to_thread(self.worker.stop, self.options.grace_s)

    async def keep_alive(self) -> None:
        """Start the worker again whenever its thread has died; its rows were told."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if self.state == "restarting":
                _log.error("the decoding thread has died; it is started again")
                self.metrics.restarts.inc()
                self.worker.start()


T = TypeVar("T")
_MAX_UNSEEN = 256  # events that wait for a client, beside those that hold its text
DONE = "[DONE]"


def submit(worker: Worker, asked: Generation, are_scores: bool = False) -> list[Ticket]:
    """A ticket for every row (are_scores: that scores prompts), or none and an ApiError."""
    requests = [one for one in asked.scores if one.given] if are_scores else asked.requests
    tickets: list[Ticket] = []
    try:
        for request in requests:
            tickets.append(worker.submit(request, asked.seconds_left, asked.wants_steps))
        return tickets
    except QueueFull as error:
        refusal = _queue_full(error, len(requests))
    except Stopped as error:
        refusal = stopping(str(error))
    except ValueError as error:
        refusal = refused(error)
    for ticket in tickets:
        ticket.cancel()
    raise refusal


def refused(error: ValueError) -> ApiError:
    """The engine's refusal of a request."""
    if isinstance(error, GrammarsFull):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "2"})
    return bad_value(error)


def _queue_full(error: QueueFull, num_rows: int) -> ApiError:
    if num_rows > error.max_waiting:  # whoever tries again would be refused for ever
        message = f"n: {num_rows} rows (prompts times n) never fit into a queue"
        return ApiError(400, f"{message} of {error.max_waiting}; ask for fewer", param="n")
    headers = {"Retry-After": str(error.retry_after_s)}
    return ApiError(429, f"queue full: {error}", code="queue_full", headers=headers)


def stopping(reason: str = "the server is stopping") -> ApiError:
    """The refusal of a server that will answer nobody any more."""
    return ApiError(
        503,
        f"{reason}; send the request to another, or again later",
        code="stopped",
        headers={"Retry-After": "5"},
    )


async def _merged(
    tickets: Sequence[Ticket], completions: dict[int, Completion], observed: Observed | None
) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of all rows as they come, each with the number of its row, until all have ended well;
    completions: where they are noted. ApiError when a row fails.

    Leaving it early cancels the rows.
    """
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def pass_on(number: int, ticket: Ticket) -> None:
        async for event in ticket.aevents():
            # What a viewer does not take in time it need not see; there is no end of it.
            if not isinstance(event, StepTaken) or events.qsize() < _MAX_UNSEEN:
                events.put_nowait((number, event))

    tasks = [asyncio.create_task(pass_on(n, ticket)) for n, ticket in enumerate(tickets)]
    try:
        while len(completions) < len(tickets):
            number, event = await events.get()
            if observed is not None:
                observed.observe(number, event)
            if isinstance(event, Failed):
                error = from_failure(event)
                if observed is not None:
                    observed.fail(error)
                raise error
            if isinstance(event, Finished):
                completions[number] = event.completion
            yield number, event
    finally:
        for ticket, task in zip(tickets, tasks, strict=True):
            ticket.cancel()
            task.cancel()
    if observed is not None:
        observed.finish(_ordered(completions))


def _ordered(completions: Mapping[int, Completion]) -> list[Completion]:
    return [completions[index] for index in range(len(completions))]


async def gather(tickets: Sequence[Ticket], observed: Observed | None = None) -> list[Completion]:
    """All completions, in order. ApiError when a row fails; the others are then called off."""
    completions: dict[int, Completion] = {}
    async for _ in _merged(tickets, completions, observed):
        pass
    return _ordered(completions)


async def score(worker: Worker, asked: Generation) -> list[Scores]:
    """Of each prompt whose log-probabilities are wanted, its tokens with them; once a choice."""
    if not asked.scores:
        return []
    rows = iter(await gather(await asyncio.to_thread(submit, worker, asked, True)))
    scores: list[Scores] = []
    for prompt, request in zip(asked.prompts, asked.scores, strict=True):
        rest = (next(rows).logprobs or ()) if request.given else ()
        scores += [[prompt[0], *rest]] * asked.num_choices
    return scores


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of the work, unless the client goes away first: then the work is cancelled."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has gone", code="cancelled")
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))  # so that the rows are called off before we go on


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def stream_lines(
    asked: Generation,
    tickets: Sequence[Ticket],
    shape: Shape,
    viewer: Viewer | None,
    observed: Observed,
) -> AsyncGenerator[dict[str, object], None]:
    """Chunks of an answer as JSON-able records; after an error of a row, it is the last record."""
    completions: dict[int, Completion] = {}
    for index in range(asked.num_answers):
        for chunk in [*shape.begin(index), *(() if tickets else shape.end(index, NOTHING))]:
            yield chunk
    try:
        async with contextlib.aclosing(_merged(tickets, completions, observed)) as events:
            async for index, event in events:
                if viewer is not None and (record := viewer.record(index, event)) is not None:
                    yield record
                if isinstance(event, TokensCommitted) and (event.text or event.logprobs):
                    for chunk in shape.text(index, event.text, event.logprobs):
                        yield chunk
                if isinstance(event, Finished):
                    for chunk in shape.end(index, event.completion):
                        yield chunk
    except ApiError as error:
        yield error.body()
        return
    ordered = _ordered(completions)
    for chunk in shape.usage(ordered, usage_of(asked, ordered)):
        yield chunk


def to_json(record: object) -> str:
    """One record as JSON on one line."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def whole_to_json(answer: dict[str, object]) -> bytes:
    """A whole answer as JSON, choice by choice: nobody else runs while one is written."""
    choices = answer.get("choices")
    if not isinstance(choices, list):
        return to_json(answer).encode()
    parts = []
    for choice in choices:
        parts.append(to_json(choice))
        time.sleep(0)
    head = to_json({**answer, "choices": []})
    return head.replace('"choices":[]', f'"choices":[{",".join(parts)}]', 1).encode()
