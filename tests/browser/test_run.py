"""One run on the page: typed, decoded by the real server, scrubbed, stopped."""

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from page_driver import Driver, number, states

pytestmark = pytest.mark.browser

MATH = (
    "Q: Zoe has 70 buttons. She buys 10 more and loses 15. How many buttons does Zoe have now?\nA:"
)
EDIT = "Edit: Rename data to values.\ndef find(data):\n    return data.index(8)\nEdited:\n"


def ask_server(address: str, **body: Any) -> dict[str, Any]:
    """The server's answer without the page and without streaming."""
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])


@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
def test_a_typed_prompt_is_decoded(tab: Driver, server: str, mode: str) -> None:
    """Guards against text or figures of the page that are not the server's."""
    tab.ask(EDIT, mode, max_tokens=40).run()
    answer = ask_server(server, prompt=EDIT, mode=mode, max_tokens=40, temperature=0)
    usage = answer["usage"]
    assert tab.written() == answer["choices"][0]["text"] != ""
    figures = tab.figures()
    assert figures["tokens"] == str(usage["completion_tokens"])
    assert figures["NFE"] == str(usage["nfe"])
    assert figures["context passes"] == str(usage["context_forwards"])
    if mode == "ar":
        assert figures["tokens/NFE"] == "\N{EN DASH}"
    else:
        assert number(figures["tokens/NFE"]) == pytest.approx(usage["tokens_per_nfe"], abs=0.006)
    assert tab.status.startswith(f"Done: {usage['completion_tokens']} tokens in ")
    assert tab.fault == ""


def test_scrubbing_shows_each_pass_as_it_was(tab: Driver, tmp_path: Path) -> None:
    """Guards the timeline: each moment must show the masks, NFE and text of its own event, not of
    the one before or of the end."""
    # No prediction is surer than 1: each pass fills one position, until the last takes the rest.
    tab.ask(MATH, "diffusion", confidence_threshold=1, steps_per_block=5, max_tokens=32).run()
    (run,) = tab.export(tmp_path)["runs"]
    events = states(run)
    assert tab.moments == len(events) >= 6
    tab.scrub(0)
    assert tab.cells == [] and tab.written() == "" and tab.figures()["tokens"] == "0"
    tokens = 0
    for moment, event in enumerate(events, start=1):
        tab.scrub(moment)
        masked = [token for token in event["tokens"] if token.get("masked")]
        shown = [cell for cell in tab.cells if cell[0] == "masked"]
        assert len(shown) == len(masked)
        assert all(text == "" for _, text, _, _ in shown), "a mask is visibly empty"
        tokens += len(event["tokens"]) if event["object"] == "twotower.commit" else 0
        assert tab.figures()["tokens"] == str(tokens)
        assert tab.figures()["NFE"] == str(event["nfe"])
        rate = tokens / event["elapsed_ms"] * 1000
        assert tokens == 0 or number(tab.figures()["tokens/s"]) == pytest.approx(rate, abs=0.51)
    assert tab.written() == run["text"]


def test_cells_tell_confidence_and_order(tab: Driver, tmp_path: Path) -> None:
    """Guards the two readings of a cell: the band of its confidence, and the pass that filled it
    (1 for what the first pass committed, however many passes followed)."""
    tab.ask(MATH, "diffusion", confidence_threshold=0.95).run()
    (run,) = tab.export(tmp_path)["runs"]
    block = [event for event in states(run) if event["block"] == 0]
    passes = [event["tokens"] for event in block if event["object"] == "twotower.step"]
    tab.scrub(len(passes))
    for at, (status, text, order, band) in enumerate(tab.cells):
        token = passes[-1][at]
        first = next(k for k, tokens in enumerate(passes, start=1) if not tokens[at]["masked"])
        bands = [0.5, 0.8, 0.95, 0.99]
        assert text == token["text"].replace(" ", "\N{MIDDLE DOT}").replace("\n", "\u21b5")
        if at == 0:  # the context tower's own: the denoiser was not asked, so it is not sure
            assert (token["confidence"], status, order, band) == (None, "own", "", "")
            continue
        assert (status, order) == ("filled", str(first))
        assert band == str(1 + sum(token["confidence"] >= limit for limit in bands))


def test_slow_motion_shows_blanks_that_fill(new_tab: Callable[..., Driver]) -> None:
    """Guards the reason for the page: the model is done in milliseconds, so people must see the
    recording pass by pass; and the playback can be paused."""
    tab = new_tab(reduced_motion="no-preference").open()
    # No prediction is surer than 1: each pass fills one position.
    tab.ask(MATH, "diffusion", confidence_threshold=1, steps_per_block=6, max_tokens=16)
    tab.page.select_option("#pace", "2", force=True)
    tab.page.evaluate(
        """() => {
          window.seen = new Set();
          const look = () => {
            const cells = [...document.querySelectorAll('.lane .cell')];
            const of = (status) => cells.filter((c) => !c.hidden && c.dataset.status === status);
            window.seen.add(`${of('masked').length} blank, ${of('filled').length} filled`);
            requestAnimationFrame(look);
          };
          look();
        }"""
    )
    tab.run()
    tab.page.wait_for_selector("#play[data-playing=false]")
    pictures = tab.page.evaluate("[...window.seen]")
    blanks = [int(picture.split()[0]) for picture in pictures if picture != "0 blank, 0 filled"]
    assert len({count for count in blanks if count > 0}) >= 3, pictures
    assert tab.page.input_value("#scrub") == str(tab.moments)
    tab.page.select_option("#pace", "0.5")
    tab.page.click("#play")  # again, from the start
    tab.until("document.querySelector('#scrub').value === '1'")
    tab.page.click("#play")
    tab.until("document.querySelector('#play').dataset.playing === 'false'")
    seen = int(tab.page.input_value("#scrub"))
    assert 1 <= seen < tab.moments
    assert tab.page.get_attribute("#play", "aria-label") == "Play"
    tab.page.click("#forward")
    assert tab.page.input_value("#scrub") == str(seen + 1)


def test_stop_keeps_what_arrived_and_frees_the_row(tab: Driver, server: str) -> None:
    """Guards against a Stop that only hides the stream while the server writes on."""
    # The page has no switch for a text that never ends by itself; the server has.
    tab.page.route("**/v1/completions", _never_ending, times=1)
    tab.ask("Notes:", "ar", max_tokens=4000, temperature=5)
    tab.page.click("#run")
    tab.until("document.querySelectorAll('.lane .cell').length > 5")
    tab.page.click("#stop")
    tab.wait()
    assert tab.status.startswith("Stopped after ") and tab.fault == ""
    written = len(tab.cells)
    assert 5 < written < 4000 and tab.moments >= written
    deadline = time.monotonic() + 30
    while metric(server, "twotower_rows_in_flight") > 0:
        assert time.monotonic() < deadline, "the row is still decoded"
        time.sleep(0.05)
    tab.scrub(3)
    assert len(tab.cells) == 3


def _never_ending(route: Any) -> None:
    route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))


@pytest.mark.parametrize("number", range(6))
def test_every_example_takes_several_passes(tab: Driver, tmp_path: Path, number: int) -> None:
    """Guards examples that are there at once, so that nobody sees a block resolve."""
    tab.page.locator("#cards button").nth(number).click()
    tab.wait()
    (run,) = tab.export(tmp_path)["runs"]
    assert tab.page.input_value("#prompt") == run["request"]["prompt"]
    first = [event for event in states(run) if event["block"] == 0]
    assert len(first) - 1 >= 2, "passes of the first block"
    assert run["usage"]["nfe"] >= 6
    assert tab.written() != "" and not tab.page.is_visible("#notice")


def test_what_is_seen_is_said(tab: Driver) -> None:
    """Guards people who see blocks for the first time: each picture has its sentence."""
    tab.page.locator("#cards button").first.click()
    tab.wait()
    seen = []
    for moment in (0, 1, tab.moments):
        tab.scrub(moment)
        seen.append(tab.page.inner_text("#seen"))
    assert seen[0] == "The prompt is prefilled; no token is generated yet."
    assert seen[1].startswith("Pass 1 filled ") and " still masked, where " in seen[1]
    assert seen[2].startswith("The context tower ")


def test_a_prompt_unlike_the_training_text_is_noticed(tab: Driver) -> None:
    """Guards the first prompt of one's own, which is answered with nonsense."""
    assert "no assistant" in tab.page.inner_text("#about")
    tab.ask("Hello, who are you?", "ar", max_tokens=4).run()
    assert "unlike the model's training text" in tab.page.inner_text("#notice")
    tab.ask(MATH, "ar", max_tokens=4).run()
    assert not tab.page.is_visible("#notice")


def test_what_a_model_or_a_prompt_says_is_never_markup(tab: Driver) -> None:
    """Guards against a prompt that runs as a script in the page of whoever opens its link."""
    evil = "<img src=x onerror=\"document.title='broken in'\"><b>bold</b>"
    tab.ask(evil, "ar", max_tokens=3).run()
    assert tab.page.locator(".given").text_content() == evil
    assert tab.page.locator(".text img, .text b").count() == 0
    assert tab.page.title() != "broken in"
