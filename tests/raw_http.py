"""Bodies of requests over raw HTTP and what becomes of them."""

import json
import time
from collections.abc import Callable

import httpx

from serving import Running

LONG = {"prompt": "The", "mode": "ar", "max_tokens": 4000, "ignore_eos": True}
SHORT = {"prompt": "The old", "max_tokens": 4, "ignore_eos": True}
URL = "/v1/completions"


def error_of(answer: httpx.Response) -> dict[str, object]:
    """The error in OpenAI's shape, of one line."""
    error: dict[str, object] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and "\n" not in error["message"]
    return error


def stream(client: httpx.Client, body: dict[str, object]) -> list[object]:
    """The records of a stream; its last line as text."""
    with client.stream("POST", URL, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def client_of(
    server: Running,
    body: dict[str, object],
    patience_s: float,
    headers: dict[str, str] | None = None,
) -> object:
    """A function that asks and goes away after its patience."""

    def ask() -> None:
        with server.client(headers=headers or {}) as client:
            client.timeout = httpx.Timeout(patience_s)
            try:
                client.post(URL, json=body)
            except httpx.TimeoutException:
                return

    return ask


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
