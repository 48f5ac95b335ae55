"""The page by keyboard, by screen reader, on a phone, in the dark and without motion."""

from collections.abc import Callable
from pathlib import Path

import pytest

from page_driver import Driver

pytestmark = pytest.mark.browser

PROMPT = "Question: What money do people use in Vietnam?\nAnswer:"
CONTRAST = (Path(__file__).parent / "contrast.js").read_text("utf-8")


def focused(tab: Driver) -> str:
    name: str = tab.page.evaluate("document.activeElement.id || document.activeElement.name")
    return name


def test_a_run_by_keyboard_alone(tab: Driver) -> None:
    """Guards people without a mouse: every step from the prompt to an old pass, with a focus that
    can be seen."""
    page = tab.page
    for _ in range(12):
        page.keyboard.press("Tab")
        if focused(tab) == "prompt":
            break
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    tab.wait()
    text = tab.written()
    assert text != ""
    order = []
    for _ in range(60):
        page.keyboard.press("Tab")
        order.append(focused(tab))
        outline = page.evaluate(
            """() => {
              const at = document.activeElement;
              const shows = at.matches('.segments input, .mode input') ? at.nextSibling : at;
              return getComputedStyle(shows).outlineStyle;
            }"""
        )
        assert outline != "none", f"the focus on {order[-1]!r} cannot be seen"
        if order[-1] == "scrub":
            break
    assert order[-1] == "scrub"
    assert [name for name in order if name in ("mode", "run", "stop", "play")] == [
        "mode",
        "run",
        "stop",
        "play",
    ]
    page.keyboard.press("Home")
    assert tab.cells == []
    page.keyboard.press("ArrowRight")
    assert page.input_value("#scrub") == "1" and tab.cells != []
    assert "pass 1" in (page.get_attribute("#scrub", "aria-valuetext") or "")
    page.keyboard.press("End")
    assert tab.written() == text


def test_escape_stops(tab: Driver) -> None:
    tab.ask("Notes:", "ar", max_tokens=4000, temperature=5)
    tab.page.focus("#prompt")
    tab.page.keyboard.press("Control+Enter")
    tab.until("document.querySelectorAll('.cell').length > 2")
    tab.page.keyboard.press("Escape")
    tab.wait()
    assert tab.status.startswith("Stopped")


def test_live_regions_do_not_flood(new_tab: Callable[..., Driver]) -> None:
    """Guards screen readers: a run is told when it starts and when it ends, not at each pass."""
    tab = new_tab(reduced_motion="no-preference").open()
    tab.page.evaluate(
        """() => {
          window.told = [];
          const regions = document.querySelectorAll('[role=status], [role=alert], [aria-live]');
          for (const region of regions) {
            new MutationObserver(() => window.told.push(region.textContent.trim()))
              .observe(region, {childList: true, characterData: true, subtree: true});
          }
        }"""
    )
    tab.ask(PROMPT, "diffusion").run()
    tab.page.wait_for_selector("#play[data-playing=false]")
    told = tab.page.evaluate("window.told")
    assert [sentence.split()[0] for sentence in told] == ["Decoding:", "Done:"]


def test_everything_has_a_name(tab: Driver) -> None:
    """Guards against buttons and fields that a screen reader can only call 'button'."""
    tab.ask(PROMPT, "speculative", "ar", max_tokens=8).run()
    nameless = tab.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, summary')]
          .filter((one) => one.checkVisibility())
          .filter((one) => !(one.getAttribute('aria-label') || one.labels?.[0]?.textContent.trim()
                             || one.textContent.trim()))
          .map((one) => one.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(new_tab: Callable[..., Driver], scheme: str) -> None:
    """Guards WCAG AA: 4.5 to 1 for text (3 to 1 for large text), with every state on the screen."""
    tab = new_tab(color_scheme=scheme).open()
    faint = tab.page.evaluate(CONTRAST)
    assert faint == [], "before a run"
    tab.ask("Q: How much is 58 - 11?\nA:", "speculative", "diffusion", temperature=0.8).run()
    for shade in ("confidence", "order"):
        tab.page.locator(f"input[name=shade][value={shade}]").check(force=True)
        for moment in range(1, tab.moments + 1, 4):
            tab.scrub(moment)
            assert tab.page.evaluate(CONTRAST) == [], f"{shade}, moment {moment}"
    tab.page.evaluate("document.querySelector('#fault').hidden = false")
    assert tab.page.evaluate(CONTRAST) == []


def test_the_switch_of_colours_is_kept(new_tab: Callable[..., Driver]) -> None:
    """Guards both ways to the dark: the system's wish, and the switch, which wins and stays."""
    tab = new_tab(color_scheme="dark").open()

    def is_dark() -> bool:
        colour = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(",")) < 200

    assert is_dark()
    tab.page.click("#theme")
    assert not is_dark()
    tab.open()
    assert not is_dark()
    tab.page.click("#theme")
    assert is_dark()


@pytest.mark.parametrize("modes", [("diffusion",), ("speculative", "ar")])
def test_a_phone_shows_everything(new_tab: Callable[..., Driver], modes: tuple[str, ...]) -> None:
    """Guards narrow screens: nothing sticks out to the side, and fingers hit what they press."""
    tab = new_tab(viewport={"width": 360, "height": 740}, has_touch=True).open()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    tab.ask(PROMPT, *modes).run()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    small = tab.page.evaluate(
        """() => [...document.querySelectorAll('button, select, textarea, summary, input')]
          .filter((one) => one.checkVisibility())
          .map((one) => [one.id || one.name, one.getBoundingClientRect()])
          .filter(([, box]) => box.height < 24 || box.width < 24 || box.right > 360 || box.left < 0)
          .map(([name]) => name)"""
    )
    assert small == []
    hidden = tab.page.evaluate(
        """() => [...document.querySelectorAll('.lane .cell')]
          .filter((one) => one.checkVisibility())
          .filter((one) => one.getBoundingClientRect().right > 360).length"""
    )
    assert hidden == 0
    box = tab.page.evaluate("document.querySelector('#player').getBoundingClientRect()")
    assert box["top"] >= -1 and box["bottom"] <= 740, "the result is brought into sight"


def test_the_block_that_is_filled_is_in_sight_on_a_phone(new_tab: Callable[..., Driver]) -> None:
    """Guards a phone whose player and figures push the blocks off the screen."""
    tab = new_tab(viewport={"width": 390, "height": 844}, reduced_motion="no-preference").open()
    tab.page.locator("#cards button").nth(1).click()
    tab.until("document.querySelector('#moment').textContent.includes('block 2, pass 1')")
    top, bottom, player = tab.page.evaluate(
        """() => {
          const cells = document.querySelector('.block.current .cells').getBoundingClientRect();
          const player = document.querySelector('#player').getBoundingClientRect();
          return [cells.top, cells.bottom, player.bottom];
        }"""
    )
    assert player <= top and bottom <= 844


def test_an_example_chosen_by_key_keeps_the_focus(tab: Driver) -> None:
    """Guards people without a mouse, whose next Tab would begin at the top of the page."""
    tab.page.locator("#cards button").first.focus()
    tab.page.keyboard.press("Enter")
    tab.wait()
    assert focused(tab) == "stage"
    tab.page.keyboard.press("Tab")
    assert focused(tab) == "back"


def test_still_pictures_for_those_who_want_them(tab: Driver) -> None:
    """Guards reduced motion: no playback and no transitions; the result is there at once."""
    for modes in (("diffusion",), ("speculative", "ar")):
        tab.ask(PROMPT, *modes).run()
        assert tab.page.get_attribute("#play", "data-playing") == "false"
        assert tab.page.input_value("#scrub") == str(tab.moments)
    duration = tab.page.evaluate(
        "getComputedStyle(document.querySelector('.lane .cell')).transitionDuration"
    )
    assert duration == "0s"
