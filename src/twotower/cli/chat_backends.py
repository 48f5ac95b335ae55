"""Where replies come from: a server over HTTP, or a model in this process.

Both take the body of a chat request and give the chunks of OpenAI's stream, so that both refuse the
same things in the same words.
"""

import contextlib
import http.client
import json
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from twotower.engine import EngineOptions, TokensCommitted, Worker
from twotower.engine.events import Failed, Finished
from twotower.engine.notice import prompt_notice
from twotower.loading import Loaded
from twotower.serve.options import ServeOptions

if TYPE_CHECKING:
    from twotower.serve.requests import Served

Body = Mapping[str, object]
Chunk = dict[str, object]
_CACHE_BYTES = 64 << 20  # a conversation begins with all that was said before
_TIMEOUT_S, _CARD_TIMEOUT_S = 600.0, 5.0


class Remote:
    """A server that speaks OpenAI's API."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r} must be the address of a server, http://HOST:PORT")
        self.name = url
        self._parts = parts
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    def connect(self) -> None:
        """ValueError (one line) if there is no server."""
        with contextlib.closing(self._connection(_CARD_TIMEOUT_S)) as connection:
            try:
                connection.connect()
            except OSError as error:
                raise ValueError(f"url={self.name!r} does not answer ({error})") from None

    def default_temperature(self) -> float | None:
        """Of a request that names none; None where the server does not tell in a few seconds."""
        with contextlib.closing(self._connection(_CARD_TIMEOUT_S)) as connection:
            try:
                connection.request("GET", f"{self._path}/models", headers=self._headers)
                (card,) = json.load(connection.getresponse())["data"]
                return float(card["twotower"]["defaults"]["temperature"])
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
                return None  # no server of ours, or none that answers now

    def reply(self, body: Body) -> Generator[Chunk, None, None]:
        """Chunks of the reply, the last with `usage`. Leaving it early stops the reply. ValueError
        (one line) when the request is refused or fails.
        """
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with contextlib.closing(self._connection()) as connection:
            try:
                path, content = f"{self._path}/chat/completions", json.dumps(asked)
                connection.request("POST", path, content, self._headers)
                answer = connection.getresponse()
                if answer.status != 200:
                    raise ValueError(_message(answer.read(), answer.status))
                yield from _chunks(answer)
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(f"{self.name} does not answer ({error})") from None

    def _connection(self, timeout: float = _TIMEOUT_S) -> http.client.HTTPConnection:
        kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
        if self._parts.scheme == "https":
            kind = http.client.HTTPSConnection
        assert self._parts.hostname is not None
        return kind(self._parts.hostname, self._parts.port, timeout=timeout)

    def close(self) -> None:
        """Each reply closes its own connection."""


def _chunks(answer: http.client.HTTPResponse) -> Generator[Chunk, None, None]:
    for line in answer:
        data = line.decode("utf-8").removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if line.startswith(b"data:"):
            chunk: Chunk = json.loads(data)
            if "error" in chunk:
                raise ValueError(_message(data.encode(), 200))
            yield chunk


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers with status {status}"


class Local:
    """A model in this process, behind the same checks as a server's."""

    def __init__(self, loaded: Loaded, served: "Served") -> None:
        options = EngineOptions(batch_size=1, prefix_cache_bytes=_CACHE_BYTES)
        self._worker = Worker(loaded.model, loaded.tokenizer, options)
        self._worker.start()
        self._model = loaded.model
        self._served = served
        self.name = served.name

    def default_temperature(self) -> float | None:
        """Of a request that names none."""
        found: float = self._served.defaults["temperature"]
        return found

    def reply(self, body: Body) -> Generator[Chunk, None, None]:
        """The same; a `notice` may come first."""
        from twotower.serve.answers import ChatShape, usage_of
        from twotower.serve.errors import ApiError
        from twotower.serve.pieces import Replies
        from twotower.serve.requests import Reader
        from twotower.serve.schema import ChatRequest, parse
        from twotower.serve.service import submit

        reader = Reader(self._served, ServeOptions(max_rows_per_request=1))
        try:
            asked = reader.chat(parse(ChatRequest, json.dumps(body).encode()))
            (ticket,) = submit(self._worker, asked)
        except ApiError as error:
            raise ValueError(error.message) from None
        template = self._served.template
        assert template is not None  # which the reader has refused
        shape = ChatShape(self.name, self._served.tokenizer, Replies(None, template.strips_reply))
        try:
            if notice := prompt_notice(self._model, asked.prompts[0]):
                yield {"choices": [], "notice": notice}
            for event in ticket.events():
                match event:
                    case TokensCommitted(text=text):
                        yield from shape.text(0, text, None)
                    case Finished(completion=completion):
                        yield from shape.usage([completion], usage_of(asked, [completion]))
                    case Failed(message=message):
                        raise ValueError(message)
        finally:
            ticket.cancel()  # also of a reply that was left before its first event

    def close(self) -> None:
        """No more replies."""
        self._worker.stop(grace_s=0.0)


Backend = Remote | Local
