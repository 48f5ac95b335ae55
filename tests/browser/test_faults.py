"""Every fault of the server is a sentence that says what to do, and the page goes on working."""

import json
from collections.abc import Callable

import pytest

from page_driver import Driver

pytestmark = pytest.mark.browser

COMPLETIONS = "**/v1/completions"


def refuse(tab: Driver, status: int, code: str, **headers: str) -> None:
    """Let the next request meet an error as the server's own code writes it."""
    body = {"error": {"message": "the reason", "type": "x", "param": None, "code": code}}
    answer = {"status": status, "headers": headers, "body": json.dumps(body)}
    tab.page.route(COMPLETIONS, lambda route: route.fulfill(**answer), times=1)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (413, "body_too_large", "too large for this server: the reason."),
        (503, "stopped", "stopping and takes no new requests."),
        (500, "internal", "failed with status 500: the reason."),
        (400, "bad_value", "did not accept the request: the reason."),
        (404, "model_not_found", "does not know this address or model: the reason."),
    ],
)
def test_a_refusal_is_a_sentence(tab: Driver, status: int, code: str, said: str) -> None:
    refuse(tab, status, code)
    tab.ask("Q:", "ar", max_tokens=2).run()
    assert said in tab.fault
    assert tab.page.get_attribute("#fault", "role") == "alert"
    tab.run()
    assert tab.fault == "" and tab.status.startswith("Done")


def test_a_full_queue_tells_the_time_to_wait(tab: Driver) -> None:
    """Guards against a page that lets people hammer a busy server, or forgets to let them back."""
    refuse(tab, 429, "queue_full", **{"Retry-After": "2"})
    tab.ask("Q:", "ar", max_tokens=2).run()
    assert "too many requests are waiting. There should be room in 2 s." in tab.fault
    assert tab.page.get_attribute("#again", "aria-disabled") == "true"
    assert tab.page.inner_text("#again") in ("Try again in 2 s", "Try again in 1 s")
    tab.page.wait_for_selector("#again[aria-disabled=false]")
    tab.page.click("#again")
    tab.wait()
    assert tab.fault == "" and tab.status.startswith("Done")


def test_a_server_that_went_away_is_told(tab: Driver) -> None:
    tab.page.context.set_offline(True)
    tab.ask("Q:", "ar", max_tokens=2).run()
    assert tab.fault == "The server cannot be reached. Is it still running?"
    tab.page.context.set_offline(False)
    tab.page.click("#again")
    tab.wait()
    assert tab.fault == "" and tab.status.startswith("Done")


def test_the_servers_own_refusal_is_shown(tab: Driver) -> None:
    """The real server's line about a field, not one of the page."""
    tab.ask("Q:", "ar", max_tokens=100_000).run()
    assert tab.fault.startswith("The server did not accept the request: ")
    assert "max_tokens" in tab.fault or "max_new_tokens" in tab.fault


def commit(text: str, block: int, nfe: int) -> str:
    event = {
        "object": "twotower.commit",
        "index": 0,
        "block": block,
        "tokens": [{"id": 1, "text": text}],
        "drafted": None,
        "accepted": None,
        "nfe": nfe,
        "context_forwards": block + 1,
        "elapsed_ms": 10.0 * (block + 1),
    }
    chunk = {"object": "text_completion", "choices": [{"index": 0, "text": text}]}
    return f"data: {json.dumps(event)}\n\ndata: {json.dumps(chunk)}\n\n"


ERROR = '{"error":{"message":"out of memory","type":"server_error","code":"memory"}}'


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (f"data: {ERROR}\n\ndata: [DONE]\n\n", "The run ended early: out of memory."),
        ("", "The connection broke off before the end."),
    ],
)
def test_a_stream_that_breaks_keeps_what_came(tab: Driver, end: str, said: str) -> None:
    """Guards the text that has arrived: it must not go when the rest does not come, and the run
    must not look finished."""
    body = commit("one", 0, 0) + commit(" two", 1, 0) + end
    tab.page.route(
        COMPLETIONS,
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
        times=1,
    )
    tab.ask("Q:", "ar").run()
    assert said in tab.fault
    assert tab.written() == "one two"
    assert tab.status.startswith("Broken off after 2 tokens")
    assert tab.page.inner_text(".lane-state") == "broken off"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_tokens", "0", "Maximum tokens must be a whole number of at least 1."),
        ("max_tokens", "1.5", "Maximum tokens must be a whole number of at least 1."),
        ("confidence_threshold", "2", "Threshold must be a number from 0 to 1."),
        ("temperature", "", "Temperature must be a number of at least 0."),
    ],
)
def test_bad_input_is_told_where_it_stands(tab: Driver, name: str, value: str, said: str) -> None:
    asked = []
    tab.page.on("request", lambda request: asked.append(request.method))
    tab.ask("Q:", "diffusion")
    tab.page.fill(f"#option-{name}", value)
    tab.page.click("#run")
    assert tab.fault == said
    assert tab.page.evaluate("document.activeElement.id") == f"option-{name}"
    assert "POST" not in asked


def test_an_empty_prompt_is_told(tab: Driver) -> None:
    tab.page.click("#run")
    assert tab.fault == "Write a prompt first."
    assert tab.page.evaluate("document.activeElement.id") == "prompt"


def test_a_server_with_keys_is_given_one(new_tab: Callable[..., Driver]) -> None:
    """Guards the key: asked for in a sentence, sent as a bearer token, kept for the tab alone."""
    tab = new_tab()
    sent = []

    def check(route: object, request: object) -> None:
        sent.append(request.headers.get("authorization"))  # type: ignore[attr-defined]
        if sent[-1] == "Bearer my-key":
            route.continue_()  # type: ignore[attr-defined]
        else:
            route.fulfill(status=401, body='{"error":{"message":"no"}}')  # type: ignore[attr-defined]

    tab.page.route("**/v1/*", check)
    tab.page.goto(tab.address)
    tab.page.wait_for_selector("#fault")
    assert "wants an API key" in tab.fault
    assert tab.page.evaluate("document.activeElement.id") == "key"
    tab.page.keyboard.type("my-key")
    tab.page.fill("#prompt", "Q:")
    tab.run()
    assert tab.fault == "" and tab.status.startswith("Done")
    assert sent[-1] == "Bearer my-key"
    tab.open()  # the same tab again: no fault
    assert tab.page.evaluate("sessionStorage.length") == 1
    assert tab.page.evaluate("localStorage.length") == 0
    assert "my-key" not in tab.page.url
