"""The process: uvicorn around the app, signals, and the order in which things stop."""

import asyncio
import logging
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from twotower.serve.keys import Keys, check_exposure, read_keys
from twotower.serve.options import ServeOptions
from twotower.serve.service import Service

_log = logging.getLogger("twotower.serve")


class Server(uvicorn.Server):
    """uvicorn's, whose stop first lets the worker finish or tell every row."""

    def __init__(
        self, config: uvicorn.Config, service: Service, greeting: str | None = None
    ) -> None:
        """greeting: what to print once requests and signals are answered."""
        super().__init__(config)
        self._service = service
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        if self._greeting is not None and not self.should_exit:  # which it has if it failed
            print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal asks for a stop, a second one for a stop at once.

        uvicorn would raise the signal again afterwards: a stop that went well is status 0.
        """
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No more connections; rows end; connections close."""
        _log.info("stopping: running requests get %g s", self._service.options.grace_s)
        ending = asyncio.create_task(self._service.stop())
        await super().shutdown(sockets)
        if self.force_exit:  # a second signal: the grace is over
            await asyncio.to_thread(self._service.worker.stop, 0.0)
        await ending


def read_checked_keys(options: ServeOptions) -> Keys:
    """The API keys; ValueError (one line) where the options forbid to start without."""
    keys = read_keys(options, os.environ)
    check_exposure(options, keys)
    return keys


def run(app: FastAPI, options: ServeOptions) -> None:
    """Serve an app of `create_app` until a signal. ValueError if the address is not free."""
    listener = _listen(options)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # the guard writes a line for every request
        server_header=False,
        proxy_headers=False,  # or anyone could choose the address that limits count
        timeout_graceful_shutdown=int(options.grace_s) + 10,
        timeout_keep_alive=30,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    page = f"http://{shown}:{port}"
    service: Service = app.state.service
    greeting = f"serving {service.served.name} at {page}/v1, page at {page}/"
    Server(config, service, greeting).run(sockets=[listener])


def _listen(options: ServeOptions) -> socket.socket:
    """A socket at the address; ValueError when it is taken or is not of this machine."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server(
            (options.host, options.port), family=family, backlog=512, reuse_port=False
        )
    except OSError as error:
        raise ValueError(
            f"host={options.host} port={options.port}: cannot listen there "
            f"({error.strerror or error}); choose others"
        ) from None
