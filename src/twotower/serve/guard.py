"""What every request passes before a route sees it, as plain ASGI.

In order: a number and a line in the log, security headers, host name, API key, limits of the
caller, and a body of bounded size that is read in bounded time.
"""

import asyncio
import json
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.serve.access import Keys, Limits
from twotower.serve.errors import ApiError
from twotower.serve.metrics import Entry, Metrics
from twotower.serve.options import ServeOptions

_log = logging.getLogger("twotower.serve")
ENTRY = "twotower.entry"  # where the scope holds the request's line of the log
CALLER = "twotower.caller"  # and whose request it is
_MAX_HELD = 256 << 20  # bytes of all bodies that are not answered yet
_KNOWN_PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses"),
    *("/v1/models", "/metrics"),
)
_OPEN_HOSTS = ("localhost", "127.0.0.1", "[::1]")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_SECURITY_HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """The ASGI app around the routes."""

    def __init__(
        self, app: ASGIApp, options: ServeOptions, keys: Keys, limits: Limits, metrics: Metrics
    ) -> None:
        self._app, self._options, self._keys = app, options, keys
        self._limits, self._metrics = limits, metrics
        self._held = 0  # bytes of bodies that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = Entry(request=secrets.token_hex(8), method=scope["method"], path=scope["path"])
        if scope["method"] == "HEAD":  # as GET; whoever sends the answer leaves out the body
            scope = {**scope, "method": "GET"}
        scope[ENTRY] = entry
        reply = _Reply(send, entry, self._options)
        start_s = time.monotonic()
        self._metrics.running.inc()
        try:
            await self._answer(scope, receive, reply)
        finally:
            self._metrics.running.dec()
            self._count(scope, reply.status)
            if "error" in entry:
                self._metrics.refused.labels(str(entry["error"])).inc()
            entry["status"] = reply.status
            entry["seconds"] = round(time.monotonic() - start_s, 4)
            _log.info("%s", entry.line())

    async def _answer(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        try:
            await self._admit(scope, receive, reply)
        except ApiError as error:
            await reply.fail(error)
        except Exception as error:
            # Nothing of ours may take the server down.
            _log.error("request=%s failed: %s", scope[ENTRY]["request"], _place(error))
            _log.debug("request=%s", scope[ENTRY]["request"], exc_info=True)
            await reply.fail(ApiError(500, "an internal error; it is in the log", code="internal"))

    async def _admit(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        headers = Headers(scope=scope)
        self._check_host(headers)
        caller = scope[CALLER] = self._caller(scope, headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, reply)
            return
        self._limits.enter(caller)
        body = bytearray()

        def release() -> None:
            self._held -= len(body)
            body.clear()

        reply.when_begun = release
        try:
            await self._read(body, headers, receive)
            await self._app(scope, _replay(bytes(body), receive), reply)
        finally:
            release()
            self._limits.leave(caller)

    async def _read(self, body: bytearray, headers: Headers, receive: Receive) -> None:
        """All of a body; ApiError as soon as it is known to be too large or too slow."""
        options = self._options
        length = headers.get("content-length", "")
        if length and "transfer-encoding" in headers:  # a proxy may have gone by the other
            told = "Content-Length and Transfer-Encoding: both are given; send one of them"
            raise ApiError(400, told, code="two_lengths", headers={"Connection": "close"})
        if length.isdecimal() and int(length[:20]) > options.max_body_bytes:
            raise _too_large(options)
        try:
            await asyncio.wait_for(self._fill(body, receive), options.body_timeout_s)
        except TimeoutError:
            raise ApiError(
                408, f"the body took longer than {options.body_timeout_s:g} s", code="body_timeout"
            ) from None

    async def _fill(self, body: bytearray, receive: Receive) -> None:
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client has gone", code="cancelled")
            part = message.get("body", b"")
            body += part
            self._held += len(part)
            if len(body) > self._options.max_body_bytes:
                raise _too_large(self._options)
            if self._held > _MAX_HELD:
                told = "too many large requests at a time; try again later"
                raise ApiError(429, told, code="queue_full", headers={"Retry-After": "2"})
            has_more = message.get("more_body", False)

    def _check_host(self, headers: Headers) -> None:
        """Without keys, a web page must not reach us by a name that it owns (DNS rebinding)."""
        options = self._options
        if self._keys or not options.is_loopback:
            return
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in _OPEN_HOSTS and name not in map(str.lower, options.allowed_hosts):
            raise ApiError(
                403,
                f"host {name!r} is not answered without API keys; start with --allowed-hosts",
                code="host",
            )

    def _caller(self, scope: Scope, headers: Headers) -> str:
        keys, path = self._keys, scope["path"]
        address = scope["client"][0] if scope.get("client") else "unknown"
        scope[ENTRY]["client"] = address
        if not keys:
            return str(address)
        if not path.startswith("/v1/") and path != "/metrics":
            return str(address)
        if scope["method"] == "OPTIONS":  # a browser's question on CORS carries no key
            return str(address)
        name = keys.caller(headers.get("authorization"))
        if name is None:
            raise ApiError(
                401,
                "give an API key of this server as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope[ENTRY]["key"] = name
        return f"key {name}"

    def _count(self, scope: Scope, status: int) -> None:
        path = scope["path"] if scope["path"] in _KNOWN_PATHS else "other"
        self._metrics.requests.labels(path, str(status)).inc()


class _Reply:
    """`send` with our headers, and an error in place of an answer that has not begun."""

    def __init__(self, send: Send, entry: Entry, options: ServeOptions) -> None:
        self._send = send
        self._entry = entry
        self._has_begun = False
        self.when_begun: Callable[[], None] = lambda: None
        self.status = 499  # unless something is sent: the client went away

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun = True
            self.when_begun()
            self.status = message["status"]
            extra = {**_SECURITY_HEADERS, "X-Request-Id": str(self._entry["request"])}
            message["headers"] = [*message.get("headers", ()), *_raw(extra)]
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Send the error, unless an answer has begun."""
        self._entry["error"] = error.code
        if self._has_begun:
            return
        body = json.dumps(error.body(), ensure_ascii=False).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            # What is left of a body must not be taken for the next request.
            **({"Connection": "close"} if error.status in (408, 413, 429) else {}),
            **error.headers,
        }
        start = {"type": "http.response.start", "status": error.status, "headers": _raw(headers)}
        await self(start)
        await self._send({"type": "http.response.body", "body": body})


def _place(error: Exception) -> str:
    """The error's type and where it was raised; its text may quote a prompt and stays out."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__} at {places}"


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]


def _too_large(options: ServeOptions) -> ApiError:
    return ApiError(
        413, f"the body is larger than {options.max_body_bytes} bytes", code="body_too_large"
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what comes after it: the client's leaving."""
    is_read = False

    async def again() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
