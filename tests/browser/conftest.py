"""A real server with the shipped model, the machine's Chromium, tabs that tolerate no faults."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from page_driver import Driver

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

SOURCE = Path(__file__).parents[2] / "src"
# How a browser tells of an answer that is not 2xx, or of none: part of the tests of faults.
_EXPECTED = re.compile(r"^Failed to load resource: ")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Address of `twotower serve` on the shipped model."""
    command = [sys.executable, "-m", "twotower.cli.main", "serve", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--backend", "eager"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"page at (http://\S+?)/?$", line):
            break
    else:
        pytest.fail(f"twotower serve did not start: {''.join(said)}")
    # Nobody reads the rest: a full pipe would stop the server.
    drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
    yield found.group(1)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    drain.wait(timeout=10)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The machine's own browser, without a window."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with api.sync_playwright() as playwright:
        # In containers the browser's own sandbox cannot start; only our own page is opened.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def plain_context(chromium: Browser) -> Iterator[BrowserContext]:
    """A window for all tests that ask for nothing special: its cache spares them the loading."""
    context = _new_context(chromium)
    yield context
    context.close()


@pytest.fixture
def faults() -> Iterator[list[str]]:
    """What went wrong in the tabs of a test: errors, requests to other hosts; none at its end."""
    found: list[str] = []
    yield found
    assert found == []


@pytest.fixture
def new_tab(chromium: Browser, server: str, faults: list[str]) -> Iterator[Callable[..., Driver]]:
    """Makes tabs in windows of their own, with Playwright's options of a context."""
    contexts: list[BrowserContext] = []

    def make(**options: Any) -> Driver:
        contexts.append(_new_context(chromium, **options))
        return _watched(contexts[-1], server, faults)

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def tab(plain_context: BrowserContext, server: str, faults: list[str]) -> Iterator[Driver]:
    """A tab with the page, ready."""
    driver = _watched(plain_context, server, faults)
    yield driver.open()
    plain_context.set_offline(False)
    driver.page.close()


def _new_context(chromium: Browser, **options: Any) -> BrowserContext:
    # Playback is not waited for, unless a test is about it.
    defaults = {"reduced_motion": "reduce", "viewport": {"width": 1280, "height": 900}}
    context = chromium.new_context(**{**defaults, **options})
    context.set_default_timeout(60_000)
    return context


def _watched(context: BrowserContext, server: str, faults: list[str]) -> Driver:
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
    page.on("console", lambda message: _note(faults, message.type, message.text))
    page.on("request", lambda request: _check_host(faults, request.url, server))
    return Driver(page, server)


def _note(faults: list[str], kind: str, text: str) -> None:
    if kind in ("error", "warning") and not _EXPECTED.match(text):
        faults.append(f"console {kind}: {text}")


def _check_host(faults: list[str], url: str, server: str) -> None:
    if url.startswith("blob:"):
        return
    if urlsplit(url).netloc != urlsplit(server).netloc:
        faults.append(f"request to another host: {url}")
