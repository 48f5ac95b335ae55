"""The two endpoints that write text: body to job, job to rows, rows to an answer or a stream."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse

from twotower.engine import Completion, Ticket
from twotower.serve.documents import answers_of, body_of
from twotower.serve.errors import ApiError
from twotower.serve.fields import Decoding, parse
from twotower.serve.guard import ENTRY
from twotower.serve.job import Job, chat_job, completion_job
from twotower.serve.observe import Entry, Observed
from twotower.serve.rows import finished, merged, stopping, submit, until_gone
from twotower.serve.schema import ChatRequest, CompletionRequest
from twotower.serve.service import Service
from twotower.serve.shapes import ChatShape, CompletionShape, Shape
from twotower.serve.stream import DONE, Viewer, stream_lines, to_data
from twotower.serve.usage import usage_of

BodyT = TypeVar("BodyT", bound=Decoding)
_SEND_TIMEOUT_S = 60.0  # a reader that takes nothing for so long has gone


def add_text_routes(app: FastAPI, service: Service) -> None:
    """/v1/completions and /v1/chat/completions."""

    @app.post(
        "/v1/completions",
        responses=answers_of("text_completion"),
        openapi_extra=body_of(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Continue prompts."""
        body = await _read(request, service, CompletionRequest)
        job = await asyncio.to_thread(completion_job, body, service.served, service.options)
        tokenizer = service.served.tokenizer
        echo = [tokenizer.decode(p) if body.echo else "" for p in job.prompts]
        each = [text for text in echo for _ in range(job.num_choices)]
        shape = CompletionShape(service.served.name, tokenizer, each, body.logprobs is not None)
        return await _answer(request, service, body, job, shape)

    @app.post(
        "/v1/chat/completions",
        responses=answers_of("chat.completion"),
        openapi_extra=body_of(ChatRequest),
    )
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        body = await _read(request, service, ChatRequest)
        job = await asyncio.to_thread(chat_job, body, service.served, service.options)
        template = service.served.template
        assert template is not None  # chat_job has refused
        has_calls = body.tools is not None and body.tool_choice != "none"
        style = template.tool_style if has_calls else None
        served = service.served
        shape = ChatShape(served.name, served.tokenizer, style, template.strips_reply)
        return await _answer(request, service, body, job, shape)


async def _read(request: Request, service: Service, record: type[BodyT]) -> BodyT:
    if service.is_stopping:
        raise stopping()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form or text/plain is what foreign web pages can send
        raise ApiError(415, f"Content-Type must be application/json, not {kind!r}")
    body = parse(record, await request.body())
    entry: Entry = request.scope[ENTRY]
    if body.user is not None:
        entry["user"] = body.user
    return body


async def _answer(
    request: Request, service: Service, body: Decoding, job: Job, shape: Shape
) -> Response:
    entry: Entry = request.scope[ENTRY]
    if service.options.log_prompts:
        decode = service.served.tokenizer.decode
        entry["prompts"] = [decode(prompt, skip_special=False) for prompt in job.prompts]
    observed = Observed(job, service.metrics, entry)
    threads = service.grammar_threads if job.has_grammar else None
    loop = asyncio.get_running_loop()
    caller = str(entry.get("key", entry["client"]))
    tickets = await loop.run_in_executor(
        threads, submit, service.worker, job, service.filters, caller
    )
    if not body.stream:
        completions = await until_gone(request.receive, _gather(tickets, observed))
        if service.options.log_prompts:
            entry["texts"] = [completion.text for completion in completions]
        return JSONResponse(shape.whole(completions, usage_of(job, completions)))
    viewer = Viewer(service.served.tokenizer, tickets) if body.twotower_events else None
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    lines = _events(stream_lines(job, tickets, shape, viewer, observed), has_usage)
    return EventSourceResponse(
        lines,
        sep="\n",
        send_timeout=_SEND_TIMEOUT_S,
        # The library would cut streams at once when the server stops; the worker ends them.
        shutdown_event=anyio.Event(),
        shutdown_grace_period=service.options.grace_s + 5,
    )


async def _gather(tickets: Sequence[Ticket], observed: Observed) -> list[Completion]:
    """All completions, in order. ApiError when a row fails; the others are then called off."""
    completions: dict[int, Completion] = {}
    events = merged(tickets)
    try:
        async for index, event in events:
            observed.hear(index, event)
            if (completion := finished(event)) is not None:
                completions[index] = completion
    except ApiError as error:
        observed.fail(error)
        raise
    finally:
        await events.aclose()
    ordered = [completions[index] for index in range(len(tickets))]
    observed.finish(ordered)
    return ordered


async def _events(
    lines: AsyncGenerator[dict[str, object], None], has_usage: bool
) -> AsyncIterator[dict[str, str]]:
    async with contextlib.aclosing(lines):  # whoever goes away closes us, and we the rows
        async for record in lines:
            if "usage" not in record or has_usage:
                yield {"data": to_data(record)}
    yield {"data": DONE}
