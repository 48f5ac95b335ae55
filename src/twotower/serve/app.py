"""The FastAPI app: routes, the page's files, and what happens at start and stop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from twotower.engine import Worker
from twotower.serve.errors import ApiError
from twotower.serve.filters import read_filters
from twotower.serve.guard import ENTRY, Guard, Rules
from twotower.serve.keys import Keys
from twotower.serve.limits import Limits
from twotower.serve.metrics import Metrics
from twotower.serve.options import ServeOptions
from twotower.serve.served import Served
from twotower.serve.service import Service
from twotower.serve.text_routes import add_text_routes

App = FastAPI  # for those who may not import the framework


def create_app(
    worker: Worker, options: ServeOptions, served: Served, keys: Keys | None = None
) -> FastAPI:
    """The API and the page over a worker, which the app starts and stops. ValueError for a bad
    filter.

    `app.state.service` is its Service. Other servers can mount it as it is.
    """
    metrics = Metrics(worker.stats)
    service = Service(worker, options, served, metrics, read_filters(options.filter))
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
    app.add_middleware(Guard, rules=Rules(options, keys or Keys({}), limits, metrics))
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
    message = {
        404: f"there is no {path}",
        405: f"{path} does not take {method}",
    }.get(error.status_code, str(error.detail))
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
