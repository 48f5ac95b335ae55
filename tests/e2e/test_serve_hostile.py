"""What callers send to end, stop or starve the server: grammars, bodies, connections."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from raw_http import LONG, SHORT, URL, client_of, error_of, wait_for
from serving import Running, running, shipped, tiny
from twotower.engine.grammar_builder import build
from twotower.serve import server as connections

CHAT = "/v1/chat/completions"
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(loaded=shipped()) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@contextlib.contextmanager
def ticking(server: Running) -> Iterator[list[float]]:
    """The longest time in which the event loop did nothing, in seconds, once it is over."""
    longest, is_over = [0.0], threading.Event()

    async def tick() -> None:
        last = time.monotonic()
        while not is_over.is_set():
            await asyncio.sleep(0.001)
            longest[0], last = max(longest[0], time.monotonic() - last), time.monotonic()

    ticks = asyncio.run_coroutine_threadsafe(tick(), server.loop)
    yield longest
    is_over.set()
    ticks.result()


def chain(length: int) -> dict[str, object]:
    names = {
        str(i): {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}}
        for i in range(length)
    }
    return {"$defs": names | {str(length): {}}, "$ref": "#/$defs/0", "type": "object"}


def patterns(first: int) -> dict[str, object]:
    each = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{first + i}}}"} for i in range(20)]
    return {"type": "object", "properties": {"a": {"allOf": each}}}


def with_format(schema: dict[str, object]) -> dict[str, object]:
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    return {"messages": [{"role": "user", "content": "a"}], "response_format": form}


def with_tool(schema: dict[str, object]) -> dict[str, object]:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return {"messages": [{"role": "user", "content": "a"}], "tools": [tool]}


@pytest.mark.parametrize("make", [with_format, with_tool])
@pytest.mark.parametrize("schema", [chain(999), patterns(0), chain(2000), {"const": "x" * 900_000}])
def test_a_hostile_grammar_is_that_requests_400(
    make: Callable[..., dict[str, object]],
    schema: dict[str, object],
    server: Running,
    client: httpx.Client,
) -> None:
    """Guards the process: 73 KB of references ended it, 1 KB of patterns took 6 GB of it."""
    start = time.monotonic()
    with ticking(server) as longest:
        answer = client.post(CHAT, json=make({"type": "object", **schema}))
    assert answer.status_code == 400, answer.text
    name = "response_format" if make is with_format else "tools"
    assert error_of(answer)["param"] == name
    assert time.monotonic() - start < 20 and longest[0] < 1
    assert client.post(URL, json=SHORT).status_code == 200


def test_others_go_on_while_a_grammar_is_built(server: Running, client: httpx.Client) -> None:
    """Guards a caller behind another one's schema."""
    body = with_format(patterns(1))
    threads = [
        threading.Thread(target=client.post, args=(CHAT,), kwargs={"json": body}) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    assert client.post(URL, json={**SHORT, "max_tokens": 1}).status_code == 200
    assert time.monotonic() - start < 1.5, "one that takes two seconds was waited for"
    for thread in threads:
        thread.join()


def test_a_deadline_counts_while_a_grammar_is_built(client: httpx.Client) -> None:
    start = time.monotonic()
    answer = client.post(CHAT, json={**with_format(patterns(2)), "deadline_s": 1.0})
    assert answer.status_code == 400 and time.monotonic() - start < 4
    assert "more than 1.0 s" in str(error_of(answer)["message"])


def test_a_client_that_leaves_has_no_grammar_built_for_it(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the one place in which grammars are built against those who only leave them there."""
    entered: list[object] = []

    def slow(*given: object) -> object:
        entered.append(given)
        time.sleep(1.5)
        return build(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("twotower.serve.service.build", slow)
    schemas: list[dict[str, object]] = [{"type": "integer", "minimum": n} for n in range(100, 108)]
    bodies = [
        {"prompt": "a", "response_format": with_format(schema)["response_format"]}
        for schema in schemas
    ]
    threads = [threading.Thread(target=client_of(server, body, 0.5)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(2)
    assert len(entered) == 1, "the others left while the first was built"


def filled(head: str, part: str, tail: str) -> bytes:
    count = (MEGABYTE - len(head) - len(tail)) // (len(part) + 1)
    return (head + ",".join([part] * count) + tail).encode()


def keys(count: int) -> str:
    return ",".join(f'"k{i}":1' for i in range(count))


USER = '{"role":"user","content":"a"}'
LARGE = {
    "ids and a text": filled('{"prompt":[', "1", ',"x"]}'),
    "a text and ids": filled('{"prompt":["x",', "1", "]}"),
    "texts and an id": filled('{"prompt":[', '"a"', ",1]}"),
    "empty texts": filled('{"prompt":[', '""', "]}"),
    "empty lists": filled('{"prompt":[', "[]", "]}"),
    "lists of bad ids": filled('{"prompt":[', "[-1]", "]}"),
    "one bad id": filled('{"prompt":[[', "1", ",-1]]}"),
    "negative ids": filled('{"prompt":[', "-1", "]}"),
    "unknown fields": ('{"prompt":"a",' + keys(80_000) + "}").encode(),
    "one unknown field": b'{"prompt":"a","' + b"promp" * 200_000 + b'":1}',
    "unknown fields inside": ('{"messages":[{' + keys(80_000) + "}]}").encode(),
    "messages": filled('{"messages":[', '{"role":"x"}', "]}"),
    "parts": filled('{"messages":[{"role":"user","content":[', "1", "]}]}"),
    "calls": filled('{"messages":[{"role":"assistant","tool_calls":[', "{}", "]}]}"),
    "tools": filled('{"messages":[' + USER + '],"tools":[', "{}", "]}"),
    "stops": filled('{"prompt":"a","stop":[', "1", "]}"),
    "unsupported": ('{"prompt":"a","logit_bias":{' + keys(80_000) + "}}").encode(),
    "many ids": filled('{"prompt":[', "1", "]}"),
    "many texts": filled('{"prompt":[', '"a"', "]}"),
    "a long text": b'{"prompt":"' + b"a b1" * 250_000 + b'"}',
    "a long message": b'{"messages":[{"role":"user","content":"' + b"a b1" * 250_000 + b'"}]}',
    "special tokens": b'{"messages":[{"role":"user","content":"' + b"<eos>" * 200_000 + b'"}]}',
    "a deep prompt": b'{"prompt":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "many digits": b'{"prompt":"a","n":' + b"1" * 1_000_000 + b"}",
    "a long mode": b'{"prompt":"a","mode":"' + b"x" * 1_000_000 + b'"}',
    "a long model": b'{"prompt":"a","model":"' + b"x" * 1_000_000 + b'"}',
    "a wide schema": (
        '{"prompt":"a","response_format":{"type":"json_schema","json_schema":{"schema":{'
        + keys(80_000)
        + "}}}}"
    ).encode(),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_body_stops_the_loop(name: str, server: Running, client: httpx.Client) -> None:
    """Guards all other callers: the errors of one body of 1 MiB took 4 to 16 seconds, in which
    nothing else happened.
    """
    body = LARGE[name]
    assert len(body) <= MEGABYTE
    path = CHAT if body.startswith(b'{"messages"') else URL
    start = time.monotonic()
    with ticking(server) as longest:
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text[:500]
    message = error_of(answer)["message"]
    assert len(str(message)) < 600
    assert longest[0] < 1 and time.monotonic() - start < 5


@pytest.mark.parametrize("depth", [101, 495, 900, 5_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deep_arguments_are_refused(depth: int, brackets: str, client: httpx.Client) -> None:
    """Guards a 500: what one recursion can read, the next cannot write."""
    inner = "1" if brackets == "[]" else '{"a":' * depth + "1" + "}" * depth
    text = "[" * depth + "]" * depth if brackets == "[]" else inner
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    answer = client.post(CHAT, json={"messages": turns, "max_tokens": 2})
    assert answer.status_code == 400
    assert "more than 100 lists and objects in one another" in str(error_of(answer)["message"])


def test_an_answer_of_log_probabilities_is_bounded(client: httpx.Client) -> None:
    """Guards memory, and everybody behind an answer of hundreds of megabytes."""
    body = {"prompt": "a", "n": 32, "max_tokens": 4000, "logprobs": 20}
    answer = client.post(URL, json=body)
    assert answer.status_code == 400 and error_of(answer)["param"] == "logprobs"


# ------------------------------------------------------------------------------ connections


def connect(server: Running, receive_buffer: int | None = None) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(10)
    connection.connect((host, int(port)))
    return connection


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1 << 16) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
UNFINISHED = {
    "nothing": b"",
    "half of the headers": HEAD,
    "half of a body": HEAD + b"Content-Length: 1000\r\n\r\n{",
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_unfinished_connections_make_room_for_new_ones(name: str) -> None:
    """Guards against 400 silent connections that nobody gets past."""
    with running(loaded=tiny(), max_connections=8) as server:
        held = [connect(server) for _ in range(40)]
        for connection in held:
            with contextlib.suppress(OSError):  # it may have been closed by now
                connection.sendall(UNFINISHED[name])
        with server.client() as client:
            assert client.post(URL, json=SHORT).status_code == 200
        assert len(server.server.server_state.connections) <= 8
        wait_for(lambda: sum(map(is_closed, held)) >= 32)
        for connection in held:
            connection.close()


def test_requests_under_way_are_not_closed_for_new_ones() -> None:
    """Guards callers who wait for their answer, and tells the new one."""
    with running(loaded=tiny(), max_connections=2, batch_size=4) as server:
        threads = [threading.Thread(target=client_of(server, LONG, 2.0)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.worker.stats().rows_in_flight == 2)
        with server.client() as client:
            refused = client.post(URL, json=SHORT)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert error_of(refused)["code"] == "too_many_connections"
        assert server.worker.stats().rows_in_flight == 2
        for thread in threads:
            thread.join()
        server.wait_until_idle()


@pytest.mark.parametrize("name", UNFINISHED)
def test_whoever_sends_no_request_is_let_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against connections that are opened and forgotten, or trickle for ever."""
    monkeypatch.setattr(connections, "_HEADER_S", 0.5)
    monkeypatch.setattr(connections, "_SWEEP_S", 0.1)
    with running(loaded=tiny(), body_timeout_s=0.5) as server, server.client() as idle:
        assert idle.get("/health").status_code == 200
        (kept,) = wait_for_connections(server, 1)
        connection = connect(server)
        connection.sendall(UNFINISHED[name])
        start = time.monotonic()
        end = start + 5
        while not is_closed(connection) and time.monotonic() < end:
            with contextlib.suppress(OSError):
                connection.send(b"" if name == "nothing" else b"a")  # each of them too late
            time.sleep(0.02)
        assert 0.4 < time.monotonic() - start < 4
        connection.close()
        assert wait_for_connections(server, 1) == [kept], "one that is kept for the next request"
        assert idle.get("/health").status_code == 200
        assert wait_for_connections(server, 1) == [kept]


def test_a_reader_that_takes_nothing_is_let_go(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards memory and rows; and it is no error of ours."""
    monkeypatch.setattr(connections, "_STALLED_S", 0.5)
    monkeypatch.setattr(connections, "_SWEEP_S", 0.1)
    caplog.set_level("INFO", "twotower.serve")
    body = json.dumps({**LONG, "max_tokens": 4000, "stream": True, "logprobs": 20}).encode()
    with running(loaded=tiny(), max_new_tokens=4096) as server:
        connection = connect(server, receive_buffer=4096)
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        (held,) = wait_for_connections(server, 1)
        sender = held.transport.get_extra_info("socket")
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        wait_for(lambda: not server.server.server_state.connections, 30)
        server.wait_until_idle()
        connection.close()
    (line,) = [message for message in caplog.messages if f"path={URL}" in message]
    assert "internal" not in line and "failed" not in "".join(caplog.messages)


def wait_for_connections(server: Running, count: int) -> list[connections.Connection]:
    found = server.server.server_state.connections
    wait_for(lambda: len(found) == count)
    return [one for one in found if isinstance(one, connections.Connection)]


def test_a_body_of_very_many_parts_is_refused(server: Running) -> None:
    """Guards the loop: a part of one byte costs as much as one of a thousand."""
    connection = connect(server)
    with ticking(server) as longest, contextlib.suppress(OSError):
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"1\r\n \r\n" * 200_000)
    assert b"400" in connection.recv(100)
    assert longest[0] < 1
    connection.close()


def test_two_lengths_of_one_body_are_refused(server: Running) -> None:
    """Guards whoever shares a connection of a proxy that goes by the other one: what one takes for
    the rest of a body is another's request to the other.
    """
    connection = connect(server)
    body = json.dumps(SHORT).encode()
    # At once: what comes behind the refusal resets the connection, and the answer is lost.
    parts = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    connection.sendall(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + parts)
    answer = b""
    while part := connection.recv(1 << 16):  # the connection is closed behind it
        answer += part
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
    assert b'"two_lengths"' in answer
    connection.close()


def test_a_body_in_usual_parts_is_read(client: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        for character in json.dumps({**SHORT, "user": "x" * 200}):
            yield character.encode()

    headers = {"Content-Type": "application/json"}
    assert client.post(URL, content=parts(), headers=headers).status_code == 200


@pytest.mark.parametrize("has_own_listener", [True, False])
def test_answers_are_sent_at_once(has_own_listener: bool) -> None:
    """Guards 44 ms on every answer: the system waits for more to send unless it is told not to."""
    with running(loaded=tiny(), has_own_listener=has_own_listener) as server:
        connection = connect(server)
        (held,) = wait_for_connections(server, 1)
        theirs = held.transport.get_extra_info("socket")
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.close()
