"""The rows of one HTTP request: submitted together, heard together, called off together."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import TypeVar

from starlette.types import Receive

from twotower.engine import (
    Completion,
    Event,
    Failed,
    Filter,
    Finished,
    QueueFull,
    Stopped,
    Ticket,
    Worker,
)
from twotower.serve.errors import ApiError, bad_value, from_failure
from twotower.serve.job import Job

T = TypeVar("T")


def submit(
    worker: Worker, job: Job, filters: tuple[Filter, ...], caller: str | None = None
) -> list[Ticket]:
    """A ticket for every row, or none and an ApiError. Blocks for as long as a grammar takes.

    caller: who asks; callers share the worker's places.
    """
    tickets: list[Ticket] = []
    try:
        for asked in job.requests:
            request = asked._replace(filters=filters, caller=caller)
            tickets.append(worker.submit(request, job.deadline_s, job.wants_steps))
        return tickets
    except QueueFull as error:
        refusal = _queue_full(error, len(job.requests))
    except Stopped as error:
        refusal = stopping(str(error))
    except ValueError as error:
        refusal = bad_value(error)
    for ticket in tickets:
        ticket.cancel()
    raise refusal


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


async def merged(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of all rows as they come, each with the number of its row; ends when all have ended.

    Leaving it early cancels the rows.
    """
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def pass_on(number: int, ticket: Ticket) -> None:
        async for event in ticket.aevents():
            events.put_nowait((number, event))

    tasks = [asyncio.create_task(pass_on(n, ticket)) for n, ticket in enumerate(tickets)]
    left = len(tickets)
    try:
        while left:
            number, event = await events.get()
            left -= isinstance(event, Finished | Failed)
            yield number, event
    finally:
        for ticket, task in zip(tickets, tasks, strict=True):
            ticket.cancel()
            task.cancel()


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


def finished(event: Event) -> Completion | None:
    """The completion if the event is a row's good end; ApiError if it is a bad one."""
    if isinstance(event, Failed):
        raise from_failure(event)
    return event.completion if isinstance(event, Finished) else None
