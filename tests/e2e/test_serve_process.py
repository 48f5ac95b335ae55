"""`twotower serve` as a process: what it refuses to start with, what it logs, how it stops."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tiny_checkpoint import make_text_checkpoint
from twotower.cli.main import main

LONG = {"prompt": "The clock", "mode": "ar", "max_tokens": 4000, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_text_checkpoint(tmp_path_factory.mktemp("serve") / "tiny"))


@contextlib.contextmanager
def process(log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address; its stderr goes into the file."""
    command = [sys.executable, "-m", "twotower.cli.main", "serve", "--port", "0", *flags]
    with log.open("w") as stderr:
        served = subprocess.Popen(command, stderr=stderr, stdout=subprocess.PIPE, text=True)
    try:
        assert served.stdout is not None
        line = served.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", line)
        assert found, log.read_text() + line
        yield served, found[0]
    finally:
        served.kill()
        served.wait()


def test_sigterm_finishes_what_it_can_tells_the_rest_and_logs_no_prompt(
    checkpoint: str, tmp_path: Path
) -> None:
    """Guards against connections that just break, and against prompts in logs."""
    log = tmp_path / "log"
    flags = ("--model", checkpoint, "--backend", "eager", "--grace-s", "0.5")
    with process(log, *flags) as (served, url):
        lines: list[str] = []
        has_begun = threading.Event()

        def ask() -> None:
            body = {**LONG, "stream": True, "user": "someone\nrequest=fake"}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    has_begun.set()

        thread = threading.Thread(target=ask)
        thread.start()
        assert has_begun.wait(20)
        served.send_signal(signal.SIGTERM)
        thread.join(timeout=20)
        assert not thread.is_alive()
        assert served.wait(timeout=20) == 0
    data = [line[6:] for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]" and json.loads(data[-2])["error"]["code"] == "stopped"
    text = log.read_text()
    assert "The clock" not in text and "Traceback" not in text
    (line,) = [line for line in text.splitlines() if "path=/v1/completions" in line]
    assert "mode=ar rows=1" in line and "error=stopped" in line
    assert r"user='someone\nrequest=fake'" in line


def test_who_has_read_the_address_may_end_the_server_at_once(
    checkpoint: str, tmp_path: Path
) -> None:
    """Guards against an address that is told before signals are heeded."""
    with process(tmp_path / "log", "--model", checkpoint, "--backend", "eager") as (served, _):
        served.send_signal(signal.SIGTERM)
        assert served.wait(timeout=20) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "give --api-keys-file FILE or --api-keys-env NAME"),
        (["--api-keys-env", "NO_SUCH_VARIABLE"], "the variable NO_SUCH_VARIABLE holds no key"),
        (["--filter", "("], "regular expression"),
        (["--host", "203.0.113.7", "--insecure"], "cannot listen there"),
        (["--chat-template", "no/such/file"], "there is no file"),
    ],
)
def test_it_refuses_to_start(
    flags: list[str], message: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", checkpoint, *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_the_extra_help_works_and_what_is_missing_is_named() -> None:
    """Guards the base install: flags are read without the web framework."""
    code = (
        "import sys; sys.modules['fastapi'] = sys.modules['uvicorn'] = None\n"
        "from twotower.cli.main import main\n"
        "assert main(['serve', '-h']) == 0\n"
        "sys.exit(main(['serve']))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 2, shown.stderr
    assert "--api-keys-file" in shown.stdout
    assert "pip install '.[serve]'" in shown.stderr
