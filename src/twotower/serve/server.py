"""The process: uvicorn around the app, its connections, signals, and how they end.

uvicorn takes every connection and waits for whatever comes of it. Here those that have not sent a
whole request, or do not read their answer, are closed in time, and the oldest of them at once when
there is no room for a new one. The system's limit of open files is never reached.
"""

import asyncio
import functools
import gc
import json
import logging
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from twotower.serve.access import Keys, check_exposure, read_keys
from twotower.serve.errors import ApiError
from twotower.serve.metrics import RateLimit
from twotower.serve.options import ServeOptions
from twotower.serve.service import Service

_log = logging.getLogger("twotower.serve")
MAX_HEADER_BYTES = 16 << 10
_PARTS = 1024  # in which a body may come, and one more for so many bytes:
_BYTES_A_PART = 512
BACKLOG = 64  # connections that are taken before their number is looked at
_HEADER_S = 10.0  # to send a request's headers, and what is left of a refused body
_STALLED_S = 30.0  # without reading anything of an answer
_SWEEP_S = 1.0
_OTHER_FILES = 256  # for model, log, grammars


@dataclass(frozen=True)
class ConnectionRules:
    """What connections may take."""

    max_connections: int
    max_body_bytes: int
    request_s: float  # from a request's headers to the end of its answer


class _Parser(h11.Connection):
    """h11's, which gives up on bodies of very many parts: each costs as much as many bytes."""

    def __init__(self, most_parts: int) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self._most_parts = most_parts
        self._num_parts = 0

    def next_event(self) -> Any:
        """The next part of a request."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_parts = 0
        elif isinstance(event, h11.Data):
            self._num_parts += 1
            if self._num_parts > self._most_parts:
                raise h11.RemoteProtocolError("a body of too many parts")
        return event


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, which knows for how long it has been waited for."""

    def __init__(self, *args: Any, rules: ConnectionRules, **given: Any) -> None:
        super().__init__(*args, **given)
        self.conn = _Parser(_PARTS + rules.max_body_bytes // _BYTES_A_PART)
        self._rules = rules
        self._since_s = time.monotonic()  # of the state it is in
        self._has_begun = False  # whether a part of a request has come
        self._unread, self._unread_since_s = 0, 0.0  # bytes of an answer, since when as many

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection: others may have to go for it, or it goes itself."""
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio sets it only where the listening socket names its protocol.
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        if len(self.connections) > self._rules.max_connections:
            _make_room(self, self.connections)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        if not self.is_busy and not self._has_begun:
            self._has_begun, self._since_s = True, time.monotonic()
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or too much of it."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer has begun
            self.transport.abort()

    def on_response_complete(self) -> None:
        """The answer is written; what follows is another request."""
        self._has_begun, self._since_s = False, time.monotonic()
        super().on_response_complete()

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_waited_for(self) -> bool:
        """Whether the client has not sent a whole request."""
        return not self.is_busy or self.cycle.more_body

    @property
    def since_s(self) -> float:
        return self._since_s

    def is_late(self, now_s: float) -> bool:
        """Whether the client has had its time."""
        if self._is_stalled(now_s):
            return True
        waited_s = now_s - self._since_s
        if self.is_busy:
            return waited_s > self._rules.request_s
        is_idle = not self._has_begun and self.cycle is not None  # uvicorn has a time for those
        return not is_idle and waited_s > _HEADER_S

    def _is_stalled(self, now_s: float) -> bool:
        unread = self.transport.get_write_buffer_size()
        if unread != self._unread or not unread:
            self._unread, self._unread_since_s = unread, now_s
        return now_s - self._unread_since_s > _STALLED_S


def _make_room(new: Connection, connections: Iterable[object]) -> None:
    """Close the connection that has been waited for longest, or else the new one."""
    others = [one for one in connections if isinstance(one, Connection) and one is not new]
    waited_for = [one for one in others if one.is_waited_for and not one.transport.is_closing()]
    if waited_for:
        min(waited_for, key=lambda one: one.since_s).transport.abort()
        return
    _log.warning("too many connections: one is refused")
    error = ApiError(503, "too many connections; try again later", code="too_many_connections")
    body = json.dumps(error.body()).encode()
    new.transport.write(
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    new.transport.close()


async def close_late(connections: Iterable[object]) -> None:
    """For ever: close those whose time is over."""
    while True:
        await asyncio.sleep(_SWEEP_S)
        now_s = time.monotonic()
        for one in list(connections):
            if isinstance(one, Connection) and one.is_late(now_s):
                one.transport.abort()


def num_possible(wanted: int) -> int:
    """As many connections as wanted, or as the limit of open files allows when it is raised."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if now != resource.RLIM_INFINITY and now < needed:
        now = needed if most == resource.RLIM_INFINITY else min(needed, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (now, most))
        wanted = min(wanted, max(now - _OTHER_FILES, now // 4))
    return wanted


class Server(uvicorn.Server):
    """uvicorn's, whose stop first lets the worker finish or tell every row."""

    def __init__(
        self, config: uvicorn.Config, service: Service, greeting: str | None = None
    ) -> None:
        """greeting: what to print once requests and signals are answered."""
        super().__init__(config)
        self._service = service
        self._greeting = greeting
        self._closing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._closing = asyncio.create_task(close_late(self.server_state.connections))
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
        if self._closing is not None:
            self._closing.cancel()


def read_checked_keys(options: ServeOptions) -> Keys:
    """The API keys; ValueError (one line) where the options forbid to start without."""
    keys = read_keys(options, os.environ)
    check_exposure(options, keys)
    return keys


def configure(app: FastAPI, options: ServeOptions, **given: object) -> uvicorn.Config:
    """uvicorn's settings; given: others of its own."""
    rules = ConnectionRules(
        num_possible(options.max_connections),
        options.max_body_bytes,
        options.deadline_s + options.body_timeout_s + 60,
    )
    return uvicorn.Config(
        app,
        # One implementation, whatever is installed beside it.
        http=functools.partial(Connection, rules=rules),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        backlog=BACKLOG,
        log_level="warning",
        access_log=False,  # the guard writes a line for every request
        server_header=False,
        proxy_headers=False,  # or anyone could choose the address that limits count
        timeout_graceful_shutdown=int(options.grace_s) + 10,
        timeout_keep_alive=30,
        **given,  # type: ignore[arg-type]
    )


def run(app: FastAPI, options: ServeOptions) -> None:
    """Serve an app of `create_app` until a signal. ValueError if the address is not free."""
    listener = _listen(options)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    page = f"http://{shown}:{port}"
    service: Service = app.state.service
    greeting = f"serving {service.served.name} at {page}/v1, page at {page}/"
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(RateLimit(burst=50, lines_a_second=1))
    _log.addFilter(RateLimit())
    gc.collect()
    gc.freeze()  # what is there now stays, and need not be looked through while others wait
    Server(configure(app, options), service, greeting).run(sockets=[listener])


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
