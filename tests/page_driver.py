"""The page of a server as a person uses it: verbs over Playwright for the tests in browser/."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

# The blocks as they are seen: [status, text, pass that filled the cell, confidence band].
_CELLS = """() => [...document.querySelectorAll('.lane .cell')]
    .filter((cell) => cell.checkVisibility())
    .map((cell) => [cell.dataset.status, cell.querySelector('.cell-text').textContent,
                    cell.querySelector('.cell-order').textContent, cell.dataset.band])"""
_FIGURES = """(lane) => {
    const rows = document.querySelectorAll('.lane')[lane].querySelectorAll('.figures > div');
    return Object.fromEntries([...rows].map((row) => [...row.children].map((e) => e.textContent)));
}"""


@dataclass
class Driver:
    """One tab with the page."""

    page: Page
    address: str

    def open(self, fragment: str = "") -> Driver:
        """Load the page and wait until it knows the model."""
        self.page.goto(f"{self.address}/{fragment}")
        self.page.wait_for_selector("#model[data-state=good]")
        return self

    def ask(self, prompt: str, *modes: str, **options: float) -> Driver:
        """Fill the form: one mode, or two for a race."""
        self.page.fill("#prompt", prompt)
        if len(modes) == 2:
            self.page.locator("input[name=view][value=race]").check(force=True)
            self.page.select_option("#mode-a", modes[0])
            self.page.select_option("#mode-b", modes[1])
        else:
            self.page.locator(f"input[name=mode][value={modes[0]}]").check(force=True)
        for name, value in options.items():
            self.page.fill(f"#option-{name}", str(value))
        return self

    def run(self) -> Driver:
        """Press Run and wait until the server has answered everything."""
        self.page.click("#run")
        return self.wait()

    def wait(self) -> Driver:
        """Until nothing runs on the server."""
        self.page.wait_for_selector("#run[aria-disabled=false]")
        return self

    def until(self, expression: str) -> Driver:
        """Wait until a JavaScript expression is true. (Playwright's own waiting for one evaluates
        text inside the page, which the page's content security policy forbids.)
        """
        deadline = time.monotonic() + 60
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, expression
            self.page.wait_for_timeout(20)
        return self

    def scrub(self, moment: int) -> Driver:
        """Move the timeline's slider."""
        self.page.fill("#scrub", str(moment))
        return self

    @property
    def moments(self) -> int:
        """Number of the last moment on the timeline."""
        return int(self.page.get_attribute("#scrub", "max") or "")

    @property
    def status(self) -> str:
        return self.page.inner_text("#status")

    @property
    def fault(self) -> str:
        """The sentence of a fault; "" when none is shown."""
        return self.page.inner_text("#fault-text") if self.page.is_visible("#fault") else ""

    @property
    def cells(self) -> list[list[str]]:
        """The visible cells of all lanes: [status, text, order, band]."""
        found: list[list[str]] = self.page.evaluate(_CELLS)
        return found

    def written(self, lane: int = 0) -> str:
        """The text that the model has written, as it is shown."""
        return self.page.locator(".written").nth(lane).text_content() or ""

    def figures(self, lane: int = 0) -> dict[str, str]:
        """A lane's figures by their label."""
        found: dict[str, str] = self.page.evaluate(_FIGURES, lane)
        return found

    def export(self, folder: Path) -> dict[str, Any]:
        """What `Export JSON` saves."""
        with self.page.expect_download() as download:
            self.page.click("#export")
        download.value.save_as(folder / "run.json")
        content: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
        return content


def milliseconds(text: str) -> float:
    """A time as the page writes it: 4.1 ms, 380 ms, 1.25 s."""
    return number(text) * (1000 if text.endswith(" s") else 1)


def states(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps and commits among an exported run's events, in order."""
    kinds = ("twotower.step", "twotower.commit")
    return [event for event in run["events"] if event["object"] in kinds]


def number(text: str) -> float:
    """The first number in a text."""
    found = re.search(r"[\d.]+", text)
    assert found is not None, text
    return float(found.group())
