"""Links that open the same run, and exports that hold all of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from page_driver import Driver, states

pytestmark = pytest.mark.browser

PROMPT = "Translate to German: Diana sees nineteen trees & 'more' +1 %.\nGerman:"


def test_a_link_opens_the_same_run(new_tab: Callable[..., Driver]) -> None:
    """Guards the promise of a link: sampled text is the same for whoever opens it, so seed and all
    options must be in it, and the prompt must survive being part of an address."""
    tab = new_tab(permissions=["clipboard-read", "clipboard-write"]).open()
    tab.ask(PROMPT, "diffusion", temperature=1.5, seed=7, max_tokens=32, steps_per_block=9).run()
    tab.page.click("#share")
    tab.until("document.querySelector('#told').textContent.includes('clipboard')")
    link = tab.page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{tab.address}/#v=1&")

    other = new_tab()
    asked = []
    other.page.on("request", lambda request: asked.append(request.url))
    other.page.goto(link)
    other.wait()
    assert other.written() == tab.written() != ""
    assert other.page.input_value("#prompt") == PROMPT
    assert other.page.input_value("#option-steps_per_block") == "9"
    assert other.page.input_value("#option-seed") == "7"
    assert other.figures()["NFE"] == tab.figures()["NFE"]
    assert not any("Diana" in url for url in asked), "the prompt stays out of the server's log"


def test_the_address_is_the_link_even_without_a_clipboard(new_tab: Callable[..., Driver]) -> None:
    tab = new_tab().open()
    tab.page.evaluate(
        "() => { navigator.clipboard.writeText = () => Promise.reject(Error('no')); }"
    )
    tab.ask("A: 1 +", "ar", max_tokens=4).run()
    tab.page.click("#share")
    tab.page.wait_for_selector("#shared")
    assert tab.page.input_value("#address") == tab.page.url
    assert "#v=1&mode=ar&max_tokens=4&temperature=0&seed=0" in tab.page.url


def test_a_link_to_a_race_opens_a_race(new_tab: Callable[..., Driver]) -> None:
    tab = new_tab()
    tab.page.goto(f"{tab.address}/#v=1&mode=ar&mode=speculative&max_tokens=8&seed=0&prompt=Q%3A")
    tab.wait()
    assert tab.page.locator(".lane").count() == 2
    assert tab.page.input_value("#mode-a") == "ar"


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        ("#v=9&mode=ar&prompt=a", "another version"),
        ("#v=1&mode=ar", "incomplete"),
        ("#v=1&mode=ar&seed=x&prompt=a", "seed is not a number"),
        ("#v=1&mode=guess&prompt=a", "no mode guess"),
    ],
)
def test_a_damaged_link_is_told_and_nothing_runs(
    new_tab: Callable[..., Driver], fragment: str, said: str
) -> None:
    tab = new_tab().open(fragment)
    tab.page.wait_for_selector("#fault")
    assert said in tab.fault
    assert tab.page.is_hidden("#result")


def test_an_export_holds_the_run_and_no_key(tab: Driver, tmp_path: Path) -> None:
    """Guards what people hand on: every event, the request as sent, and never the API key."""
    tab.page.get_by_text("API key", exact=True).click()
    tab.page.fill("#key", "secret-key")
    tab.ask("Question: What money do people use in Vietnam?\nAnswer:", "diffusion").run()
    content = tab.export(tmp_path)
    assert (content["format"], content["version"]) == ("twotower.run", 1)
    (run,) = content["runs"]
    assert run["request"]["mode"] == "diffusion" and run["request"]["seed"] == 0
    assert run["text"] == tab.written() and run["finish_reason"] == "stop"
    committed = [e for e in states(run) if e["object"] == "twotower.commit"]
    assert sum(len(e["tokens"]) for e in committed) == run["usage"]["completion_tokens"]
    assert "secret-key" not in (tmp_path / "run.json").read_text("utf-8")
