"""The FastAPI app: routes, the page's files, and what happens at start and stop.

The two endpoints that write text turn a body into rows, and rows into an answer or a stream.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from twotower.engine import Worker
from twotower.serve.access import Keys, Limits
from twotower.serve.answers import NOTHING, ChatShape, CompletionShape, Shape, usage_of
from twotower.serve.errors import ApiError, bad_value
from twotower.serve.guard import CALLER, ENTRY, Guard
from twotower.serve.metrics import Entry, Metrics, Observed
from twotower.serve.openapi import answers_of, body_of
from twotower.serve.options import ServeOptions
from twotower.serve.pieces import Replies, Scores
from twotower.serve.requests import Generation, Served
from twotower.serve.responses import ResponseShape, ResponsesRequest, as_chat
from twotower.serve.schema import ChatRequest, CompletionRequest, Decoding, parse
from twotower.serve.service import (
    DONE,
    Service,
    gather,
    score,
    stopping,
    stream_lines,
    submit,
    to_json,
    until_gone,
    whole_to_json,
)
from twotower.serve.viewer import Viewer

App = FastAPI  # for those who may not import the framework


def create_app(
    worker: Worker, options: ServeOptions, served: Served, keys: Keys | None = None
) -> FastAPI:
    """The API and the page over a worker, which the app starts and stops. ValueError for a bad
    filter.

    `app.state.service` is its Service. Other servers can mount it as it is.
    """
    metrics = Metrics(worker.stats)
    service = Service(worker, options, served, metrics)
    app = FastAPI(
        title="twotower",
        version="1",
        description="OpenAI-compatible API of a two-tower block-diffusion language model.",
        docs_url=None,  # its page loads scripts of a CDN
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.service = service
    limits = Limits(options.key_concurrency, options.key_requests_per_minute)
    app.add_middleware(Guard, options, keys or Keys({}), limits, metrics)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's package for browsers sends a dozen of its own
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_exception_handler(HTTPException, _no_route)
    add_text_routes(app, service)
    _add_state_routes(app, service)
    _add_page(app, Path(str(resources.files("twotower.serve") / "web")))
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.worker.start()
    watching = asyncio.create_task(service.keep_alive())
    try:
        yield
    finally:
        watching.cancel()
        await service.stop()


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    known = {404: f"there is no {path}", 405: f"{path} does not take {method}"}
    message = known.get(error.status_code, str(error.detail))
    refusal = ApiError(error.status_code, message)
    request.scope[ENTRY]["error"] = refusal.code
    return JSONResponse(refusal.body(), error.status_code, headers=error.headers)


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    def models() -> dict[str, object]:
        """The model that is served."""
        return {"object": "list", "data": [service.served.card()]}

    @app.get("/v1/models/{model_id:path}", responses={404: {"description": "No such model."}})
    def model(model_id: str) -> dict[str, object]:
        """The same, by name."""
        if model_id != service.served.name:
            raise ApiError(404, f"model {model_id!r} is not served here", code="model_not_found")
        return service.served.card()

    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "It would not be decoded now."}})
    def ready() -> JSONResponse:
        """Whether a request would be decoded now."""
        state = service.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


# Not asked of the machine: some say text/plain for scripts, which browsers then refuse.
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


def _add_page(app: FastAPI, folder: Path) -> None:
    """Each file of the folder under its name, and index.html at /."""

    def add(url: str, file: Path) -> None:
        async def page() -> FileResponse:
            headers = {"Cache-Control": "no-cache"}
            return FileResponse(file, headers=headers, media_type=_TYPES[file.suffix])

        app.add_api_route(url, page, include_in_schema=False)

    files = sorted(file for file in folder.iterdir() if file.suffix in _TYPES)
    for file in files:
        add(f"/{file.name}", file)
        if file.name == "index.html":
            add("/", file)


_SMALL_BODY = 16 << 10  # bytes that are read at once, which is less than a change of threads
BodyT = TypeVar("BodyT", bound=Decoding)


def add_text_routes(app: FastAPI, service: Service) -> None:
    """The endpoints that write text."""
    for path, (record, kind, explanation, ask) in _ENDPOINTS.items():
        app.add_api_route(
            path,
            _endpoint(service, record, ask),
            methods=["POST"],
            description=explanation,
            name=path.rpartition("/v1/")[2],
            responses=answers_of(kind),
            openapi_extra=body_of(record),
        )


Asked = tuple[Generation, Callable[[Sequence[Scores]], Shape]]  # what is asked, how it is answered
Ask = Callable[[Any, Service, str], Asked]


def _endpoint(
    service: Service, record: type[Decoding], ask: Ask
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        body = await _read(request, service, record)
        try:
            asked, shape = await asyncio.to_thread(ask, body, service, request.scope[CALLER])
            return await _answer(request, service, body, asked, shape)
        except ApiError as error:
            raise error.renamed(record.names) from None

    return endpoint


def _completion(body: CompletionRequest, service: Service, caller: str) -> Asked:
    asked, served = service.reader.completion(body, caller), service.served
    try:
        echo = [served.tokenizer.decode(p) if body.echo else "" for p in asked.prompts]
    except ValueError as error:  # an id that is no token
        raise bad_value(error) from None
    each, has_logprobs = (
        [t for t in echo for _ in range(asked.num_choices)],
        body.num_alternatives is not None,
    )
    return asked, partial(CompletionShape, served.name, served.tokenizer, each, has_logprobs)


def _chat(body: ChatRequest, service: Service, caller: str) -> Asked:
    asked, served = service.reader.chat(body, caller), service.served
    return asked, lambda _: ChatShape(served.name, served.tokenizer, _replies(body, served))


def _response(body: ResponsesRequest, service: Service, caller: str) -> Asked:
    chat, served = as_chat(body), service.served
    asked = service.reader.chat(chat, caller)
    return asked, lambda _: ResponseShape(served.name, _replies(chat, served), body)


def _replies(body: ChatRequest, served: Served) -> Replies:
    """How replies are taken apart."""
    assert served.template is not None  # which the reader has refused
    has_calls = bool(body.tools) and body.tool_choice != "none"
    style = served.template.tool_style if has_calls else None
    return Replies(style, served.template.strips_reply and not body.continue_final_message)


_ENDPOINTS: dict[str, tuple[type[Decoding], str, str, Ask]] = {
    "/v1/completions": (CompletionRequest, "text_completion", "Continue prompts.", _completion),
    "/v1/chat/completions": (ChatRequest, "chat.completion", "Answer a conversation.", _chat),
    "/v1/responses": (ResponsesRequest, "response", "Answer a conversation, in items.", _response),
}


async def _read(request: Request, service: Service, record: type[BodyT]) -> BodyT:
    if service.is_stopping:
        raise stopping()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form or text/plain is what foreign web pages can send
        raise ApiError(415, f"Content-Type must be application/json, not {kind!r}")
    content = await request.body()
    is_small = len(content) < _SMALL_BODY
    body = parse(record, content) if is_small else await asyncio.to_thread(parse, record, content)
    entry: Entry = request.scope[ENTRY]
    if (user := body.user or body.safety_identifier) is not None:
        entry["user"] = user
    return body


async def _answer(
    request: Request,
    service: Service,
    body: Decoding,
    asked: Generation,
    shape_of: Callable[[Sequence[Scores]], Shape],
) -> Response:
    entry: Entry = request.scope[ENTRY]
    tokenizer = service.served.tokenizer
    if service.options.log_prompts:
        entry["prompts"] = [tokenizer.decode(p, skip_special=False) for p in asked.prompts]
    observed = Observed(asked, service.metrics, entry)
    shape = shape_of(await until_gone(request.receive, score(service.worker, asked)))
    built = await until_gone(request.receive, service.build(asked))
    tickets = await asyncio.to_thread(submit, service.worker, asked)
    del built  # the rows hold it
    if not body.stream:
        completions = await until_gone(request.receive, gather(tickets, observed))
        completions = completions or [NOTHING] * asked.num_answers
        if service.options.log_prompts:
            entry["texts"] = [completion.text for completion in completions]
        answer = await asyncio.to_thread(
            lambda: whole_to_json(shape.whole(completions, usage_of(asked, completions)))
        )
        return Response(answer, media_type="application/json")
    viewer = Viewer(service.served, tickets) if body.twotower_events else None
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    lines = _events(stream_lines(asked, tickets, shape, viewer, observed), has_usage)
    return EventSourceResponse(
        lines,
        sep="\n",
        # The library would cut streams at once when the server stops; the worker ends them.
        shutdown_event=anyio.Event(),
        shutdown_grace_period=service.options.grace_s + 5,
    )


async def _events(
    lines: AsyncGenerator[dict[str, object], None], has_usage: bool
) -> AsyncIterator[dict[str, str]]:
    async with contextlib.aclosing(lines):  # whoever goes away closes us, and we the rows
        async for record in lines:
            if "usage" in record and not has_usage:
                continue
            if "choices" in record and has_usage:
                record.setdefault("usage", None)
            kind = record.get("type")
            yield {"data": to_json(record)} | ({"event": str(kind)} if kind else {})
    yield {"data": DONE}
