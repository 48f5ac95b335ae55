"""The server over raw HTTP: bad input, clients that go away, what is told and counted."""

import json
import re
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from raw_http import LONG, SHORT, URL, error_of, stream, wait_for
from serving import Running, running, tiny

# Of an answer, which may hold any digits.
NUMBERS = re.compile(r'"(id":"cmpl-|created":|elapsed_ms":)[0-9a-f.]+')


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(loaded=tiny(), max_body_bytes=20_000, body_timeout_s=0.5) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


OBJECT = {"type": "json_object"}
BAD: list[tuple[object, str | None, str]] = [
    (b"", None, "not JSON"),
    (b"{", None, "not JSON"),
    (b'{"prompt": "\\ud800"}', None, "not JSON"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature", ""),
    (b"[" * 5000, None, "not JSON"),
    ([], None, "must be a JSON object"),
    ({}, "prompt", "prompt"),
    ({"prompt": ""}, "prompt", "non-empty"),
    ({"prompt": []}, "prompt", "list of token ids"),
    ({"prompt": [[]]}, "prompt", "list of token ids"),
    ({"prompt": [1, True]}, "prompt", "list of token ids"),
    ({"prompt": [1, 5000]}, "prompt", "outside the vocabulary"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "max_tokens=-1 must be at least 1"),
    ({"prompt": [1, 5000], "echo": True}, "prompt", "outside the vocabulary"),
    ({"prompt": [1, 5000], "echo": True, "max_tokens": 0}, "prompt", "outside the vocabulary"),
    ({"prompt": "a", "max_tokens": 5000}, "max_tokens", "at most 4096"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "integer"),
    ({"prompt": "a", "temperature": True}, "temperature", "number"),
    ({"prompt": "a", "promt": "b"}, "promt", ", perhaps prompt;"),
    ({"prompt": "a", "foo-bar": 1}, "foo-bar", "foo-bar is not a field of this request; see"),
    ({"prompt": "a", "str": 1}, "str", "str is not a field"),
    ({"prompt": "a", "stream_options": {"int": 1}}, "stream_options.int", "int is not a field"),
    ({"prompt": "a", "top_p": 1e-300}, "top_p", "must be between 1e-06 and 1"),
    ({"prompt": "a", "deadline_s": 5e-324}, "deadline_s", "greater than or equal to 1"),
    ({"prompt": "a", "response_format": OBJECT, "mode": "diffusion"}, "mode", "use mode='spec"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    ({"prompt": "a", "best_of": 4}, "best_of", "not supported: texts are"),
    ({"prompt": "a", "best_of": {"a": 1}}, "best_of", "not supported: texts are"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "must map token ids"),
    ({"prompt": "a", "logit_bias": {"5000": 1}}, "logit_bias", "outside the vocabulary"),
    ({"prompt": "a", "presence_penalty": 3.0}, "presence_penalty", "between -2.0 and 2.0"),
    ({"prompt": "a", "min_p": 2.0}, "min_p", "between 0 and 1"),
    ({"prompt": "a", "mode": "diffusion", "presence_penalty": 1.0}, "presence_penalty", "use mode"),
    ({"prompt": "a", "n": 33}, "n", "32"),
    ({"prompt": ["a"] * 33}, "n", "32"),
    ({"prompt": "a b" * 3000}, "prompt", "at most 8192"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop", "16"),
    ({"prompt": "a", "mode": "ar", "steps_per_block": 2}, "steps_per_block", "no effect"),
    ({"prompt": "a", "block_size": 65}, "block_size", "at most 64"),
    ({"prompt": "a", "max_tokens": 2, "max_new_tokens": 3}, "max_tokens", "contradicts max_new"),
    ({"prompt": "a", "schedule": "x", "mode": "posterior"}, "schedule", "linear"),
    ({"prompt": "a", "twotower_events": True}, "twotower_events", "needs stream"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    (
        {"prompt": "a", "audio": {"voice": "x"}},
        "audio",
        "audio is not a field of this request",
    ),
    ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format", "needs"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD)
def test_a_bad_body_is_refused_by_name(
    body: object, param: str | None, message: str, client: httpx.Client
) -> None:
    """Guards against fields that are ignored and against errors that name nothing."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert message in str(error["message"])


def test_neutral_values_of_unsupported_fields_are_taken(client: httpx.Client) -> None:
    """Guards against refusing clients that spell out OpenAI's defaults."""
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "suffix": None}
    answer = client.post(URL, json={**SHORT, **neutral, "best_of": 1, "user": "u1"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("method", "path", "kind", "status"),
    [
        ("POST", "/v1/engines", "application/json", 404),
        ("GET", URL, "application/json", 405),
        ("POST", URL, "text/plain", 415),
        ("POST", "/v1/models", "application/json", 405),
        ("GET", "/v1/models/other", "application/json", 404),
    ],
)
def test_wrong_doors(method: str, path: str, kind: str, status: int, client: httpx.Client) -> None:
    answer = client.request(method, path, content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == status
    error_of(answer)


def test_a_checkpoint_without_a_chat_template_says_so(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]}
    error = error_of(client.post("/v1/chat/completions", json=body))
    assert error["code"] == "no_chat_template"


def test_a_large_body_is_refused_before_it_is_read(server: Running) -> None:
    """Guards against memory that a client can fill: with a length, and without one."""
    port = httpx.URL(server.url).port
    assert port is not None
    for header in (b"Content-Length: 100000000\r\n", b"Transfer-Encoding: chunked\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\n" + header + b"\r\n"
            )
            if b"chunked" in header:
                raw.sendall(b"5208\r\n" + b"a" * 0x5208 + b"\r\n")  # 21,000 bytes, no last chunk
            assert raw.recv(12) == b"HTTP/1.1 413"


def test_a_slow_body_is_given_up(server: Running) -> None:
    port = httpx.URL(server.url).port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        assert raw.recv(12) == b"HTTP/1.1 408"


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_frees_its_row(is_streamed: bool, server: Running) -> None:
    """Guards against rows that go on for nobody."""
    port = httpx.URL(server.url).port
    assert port is not None
    before = server.worker.stats().num_failed
    body = json.dumps({**LONG, "stream": is_streamed}).encode()
    raw = socket.create_connection(("127.0.0.1", port), timeout=10)
    raw.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    wait_for(lambda: server.worker.stats().rows_in_flight == 1)
    raw.close()
    start = time.monotonic()
    server.wait_until_idle()
    assert time.monotonic() - start < 2.0, "the row outlived its client"
    assert server.worker.stats().num_failed == before + 1


def test_block_states_tell_the_whole_story(client: httpx.Client) -> None:
    """Guards the page: steps, then the commit they led to, then its text."""
    body = {**SHORT, "max_tokens": 9, "mode": "diffusion", "stream": True, "twotower_events": True}
    records = stream(client, body)
    assert records[-1] == "[DONE]"
    kinds = [record["object"] for record in records[:-1]]
    assert kinds[:2] == ["twotower.step"] * 2 or kinds[1] == "twotower.commit"
    commits = [record for record in records[:-1] if record["object"] == "twotower.commit"]
    steps = [record for record in records[:-1] if record["object"] == "twotower.step"]
    assert [commit["block"] for commit in commits] == list(range(len(commits)))
    assert sum(len(commit["tokens"]) for commit in commits) == 9
    for commit in commits:
        last = [step for step in steps if step["block"] == commit["block"]][-1]
        assert not any(token["masked"] for token in last["tokens"])
        shown = [token["id"] for token in last["tokens"]][: len(commit["tokens"])]
        assert [token["id"] for token in commit["tokens"]] == shown
        assert commit["nfe"] == last["nfe"] and commit["elapsed_ms"] > 0
    for step in steps:
        for token in step["tokens"]:
            assert (token["id"] is None) == token["masked"] == (token["text"] == "")


def test_the_pages_files_are_served_as_what_they_are(client: httpx.Client) -> None:
    """Guards against scripts that a browser refuses, and files that are left out."""
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    names = re.findall(r'(?:src|href)="\./([^"#?]+)"', page.text)
    assert names
    for name in names:
        answer = client.get(f"/{name}")
        assert answer.status_code == 200, name
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        assert answer.headers["content-type"].startswith(kind[name.rpartition(".")[2]])
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    assert client.get("/../pyproject.toml").status_code == 404
    assert client.get("/web/index.html").status_code == 404


def figures(client: httpx.Client) -> dict[str, float]:
    """What /metrics says, by name and labels."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_tell_what_happened(server: Running, client: httpx.Client) -> None:
    """Guards against figures that nobody feeds."""
    server.wait_until_idle()
    before = figures(client)
    usage = client.post(URL, json={**SHORT, "mode": "speculative"}).json()["usage"]
    client.post(URL, json={"prompt": 5})
    after = figures(client)

    def rise(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert rise('twotower_requests_total{path="/v1/completions",status="200"}') == 1
    assert rise('twotower_requests_total{path="/v1/completions",status="400"}') == 1
    assert rise('twotower_refused_total{reason="bad_value"}') == 1
    assert rise("twotower_tokens_total") == usage["completion_tokens"] == 4
    assert rise("twotower_nfe_total") == usage["nfe"]
    assert rise("twotower_context_forwards_total") == usage["context_forwards"]
    assert rise("twotower_prompt_tokens_total") == usage["prompt_tokens"]
    assert rise('twotower_row_ends_total{mode="speculative",reason="length"}') == 1
    assert rise("twotower_draft_tokens_total") >= rise("twotower_accepted_tokens_total") >= 0
    for name in ("time_to_first_block_seconds", "request_seconds", "time_per_token_seconds"):
        assert rise(f'twotower_{name}_count{{mode="speculative"}}') == 1
        assert 0 < rise(f'twotower_{name}_sum{{mode="speculative"}}') < 60
    assert after["twotower_requests_in_flight"] == 1  # the question itself
    assert after["process_resident_memory_bytes"] > 0


def test_errors_are_counted_wherever_they_are_told(client: httpx.Client) -> None:
    """Guards against alarms that see some errors only: of routes, of none, within a stream."""
    before = figures(client)
    client.post(URL, json={**SHORT, "mode": "ar", "adaptive": True})
    client.post(URL, content=b"{}", headers={"Content-Type": "text/plain"})
    client.get("/no/such/path")
    stream(client, {**LONG, "stream": True, "deadline_s": 1})
    after = figures(client)
    for reason in ("bad_value", "content_type", "no_such_path", "deadline"):
        name = f'twotower_refused_total{{reason="{reason}"}}'
        assert after[name] - before.get(name, 0.0) == 1, reason


def test_foreign_pages_cannot_reach_an_open_server(client: httpx.Client) -> None:
    """Guards against DNS rebinding and against CORS that is open by default."""
    rebound = client.post(URL, json=SHORT, headers={"Host": "evil.example"})
    assert rebound.status_code == 403
    answer = client.post(URL, json=SHORT, headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_filters_match_leaves_by_no_door() -> None:
    """Guards against text that is held back in one form of answer and shown in another."""
    with running(filter=("48 - 4[0-9]",)) as server, server.client() as client:
        body = {"prompt": "Q: How much is 48 - 44?\nA:", "max_tokens": 30, "mode": "diffusion"}
        whole = client.post(URL, json={**body, "logprobs": 0})
        assert whole.json()["choices"][0]["finish_reason"] == "content_filter"
        assert whole.json()["choices"][0]["text"] == " "
        with client.stream(
            "POST", URL, json={**body, "stream": True, "twotower_events": True}
        ) as s:
            text = s.read().decode()
        assert '"finish_reason":"content_filter"' in text
        for answer in (whole.text, text):
            assert "48" not in NUMBERS.sub("", answer)
