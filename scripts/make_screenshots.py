"""Pictures of the page for the README and docs/page.md, taken of a real server in a real browser.

Starts `twotower serve` on the shipped model and the machine's Chromium (pip install playwright),
decodes example prompts and writes docs/serve_*.png. Usage: python scripts/make_screenshots.py
"""

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
DESKTOP = {"width": 1280, "height": 860}
TALL = {"width": 1280, "height": 1060}
PHONE = {"width": 360, "height": 760}
MAX_BYTES = 200_000


@dataclass(frozen=True)
class Picture:
    """A file in docs/ and how the page comes to look that way."""

    name: str
    size: dict[str, int]
    scheme: str
    act: Callable[[Page], None]


def choose(page: Page, mode: str) -> None:
    page.locator(f"input[name=mode][value={mode}]").check(force=True)


def decode(page: Page, example: str) -> None:
    """Run an example and wait for the server; motion is reduced, so its end is shown at once."""
    page.get_by_role("button", name=example).first.click()
    page.wait_for_selector("#run[aria-disabled=false]")


def scrub(page: Page, share: float) -> None:
    """Move the timeline to a share of the run."""
    last = int(page.get_attribute("#scrub", "max") or "0")
    page.fill("#scrub", str(round(last * share)))


def start(page: Page) -> None:
    """The empty page."""


def fill_blocks(page: Page) -> None:
    """A diffusion run in the middle of a block that needs several passes."""
    choose(page, "diffusion")
    decode(page, "Tool call")
    last = int(page.get_attribute("#scrub", "max") or "0")
    # The moment with the most blanks after the first block: that is what the page is for.
    page.fill("#scrub", str(max(range(2, last + 1), key=lambda k: blanks_at(page, k))))


def blanks_at(page: Page, moment: int) -> int:
    page.fill("#scrub", str(moment))
    return page.locator(".block.current .cell[data-status=masked]:visible").count()


def race(page: Page) -> None:
    """Self-speculation against AR, past the middle."""
    page.locator("input[name=view][value=race]").check(force=True)
    decode(page, "Tool call")
    scrub(page, 0.6)


def show_result(page: Page) -> None:
    """A whole run on a phone, scrolled to the result."""
    choose(page, "speculative")
    decode(page, "Knowledge")
    page.locator("#stage").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('#stage').scrollIntoView()")


PICTURES = (
    Picture("serve_start.png", DESKTOP, "light", start),
    Picture("serve_run.png", DESKTOP, "light", fill_blocks),
    Picture("serve_race.png", TALL, "dark", race),
    Picture("serve_phone.png", PHONE, "light", start),
    Picture("serve_phone_run.png", PHONE, "dark", show_result),
)


@contextmanager
def server() -> Iterator[str]:
    """Address of a server on the shipped model."""
    command = [sys.executable, "-m", "twotower.cli.main", "serve", "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"page at (http://\S+?)/?$", line):
                yield found.group(1)
                return
        raise SystemExit("twotower serve did not start; run it by hand to see why")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def take(browser: Browser, address: str, picture: Picture) -> bytes:
    """The picture as a PNG of few colours."""
    context = browser.new_context(
        viewport=picture.size,
        color_scheme=picture.scheme,
        reduced_motion="reduce",
        device_scale_factor=1.5 if picture.size is PHONE else 1,
    )
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#model[data-state=good]")
    picture.act(page)
    shot = Image.open(io.BytesIO(page.screenshot()))
    context.close()
    small = io.BytesIO()
    few = shot.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("no chromium on this machine; install it")
    with server() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for picture in PICTURES:
            data = take(browser, address, picture)
            if len(data) > MAX_BYTES:
                raise SystemExit(f"{picture.name}: {len(data)} bytes; at most {MAX_BYTES}")
            (DOCS / picture.name).write_bytes(data)
            print(f"docs/{picture.name}: {len(data)} bytes")
        browser.close()


if __name__ == "__main__":
    main()
