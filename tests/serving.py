"""A real server on a free port, in a thread: uvicorn, the app, a worker, the shipped model."""

import asyncio
import contextlib
import dataclasses
import functools
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tiny_checkpoint import make_text_checkpoint
from twotower.cli.serve import ServeArguments, describe
from twotower.engine import Worker
from twotower.loading import Loaded, Placement, load
from twotower.serve.access import Keys
from twotower.serve.app import create_app
from twotower.serve.server import Server, _listen, configure
from twotower.serve.service import Service


@functools.cache
def shipped() -> Loaded:
    """The model inside the package, eager: nothing is compiled for a test."""
    return load(Placement(backend="eager"))


@functools.cache
def tiny() -> Loaded:
    """A tiny random model, for tests that do not look at the text; its folder is `name`."""
    folder = make_text_checkpoint(Path(tempfile.mkdtemp()) / "tiny")
    return load(Placement(model=str(folder), backend="eager"))


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`."""

    url: str
    service: Service
    worker: Worker
    server: Server

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The server's event loop."""
        loop: asyncio.AbstractEventLoop = self.server.servers[0].get_loop()
        return loop

    def client(self, **given: object) -> httpx.Client:
        """A client of its API."""
        return httpx.Client(base_url=self.url, timeout=60, **given)  # type: ignore[arg-type]

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        """Until no row is left; AssertionError if one stays."""
        end = time.monotonic() + timeout_s
        while (stats := self.worker.stats()).rows_waiting or stats.rows_in_flight:
            assert time.monotonic() < end, stats
            time.sleep(0.01)


@contextlib.contextmanager
def running(
    keys: Keys | None = None,
    loaded: Loaded | None = None,
    has_own_listener: bool = False,
    **given: object,
) -> Iterator[Running]:
    """Serve a model (the shipped one) with these options of `twotower serve`.

    has_own_listener: on a socket as the command makes it.
    """
    loaded = loaded or shipped()
    model = None if loaded.name == "shipped" else loaded.name
    options = ServeArguments(model=model, **given)  # type: ignore[arg-type]  # as a test names them
    worker = Worker(loaded.model, loaded.tokenizer, options)
    app = create_app(worker, options, describe(loaded, options, options.model_name), keys)
    server = Server(configure(app, options, host="127.0.0.1", port=0), app.state.service)
    sockets = [_listen(dataclasses.replace(options, port=0))] if has_own_listener else None
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", app.state.service, worker, server)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive(), "the server did not stop"
