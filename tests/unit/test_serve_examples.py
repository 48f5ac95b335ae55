"""The unit and the container file of examples/serve, and the metrics that docs/serving.md tells."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from twotower.cli.parse import parse
from twotower.cli.serve import ServeArguments
from twotower.engine import WorkerStats
from twotower.serve.access import Keys, check_exposure
from twotower.serve.metrics import Metrics

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "examples" / "serve" / "twotower.service"
CONTAINER = ROOT / "examples" / "serve" / "Containerfile"
INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "HEALTHCHECK"}
INSTRUCTIONS |= {"STOPSIGNAL", "ENTRYPOINT"}


def serve_flags(command: list[str]) -> ServeArguments:
    """The options of a command line; the error of `twotower serve` if it would not start."""
    verb = command.index("serve")
    return parse(ServeArguments, "serve", command[verb + 1 :])


def has_keys(options: ServeArguments) -> bool:
    return options.api_keys_file is not None or options.api_keys_env is not None


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    """With systemd's own linter where there is one; its line of the command by our own parser."""
    text = UNIT.read_text()
    section = re.search(r"^\[Service\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    pairs = [line.split("=", 1) for line in section[1].splitlines() if line and line[0] != "#"]
    settings = {name: value for name, value in pairs}
    options = serve_flags(shlex.split(settings["ExecStart"]))
    assert has_keys(options), "the unit listens on every address"
    assert int(settings["TimeoutStopSec"]) > options.grace_s, "systemd would kill before the end"
    linter = shutil.which("systemd-analyze")
    if linter is None:
        return
    program = tmp_path / "twotower"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name  # with a program that is there
    unit.write_text(text.replace("/opt/twotower/bin/twotower", str(program)))
    command = [linter, "verify", "--man=no", str(unit)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    about_us = [line for line in checked.stderr.splitlines() if UNIT.name in line]
    assert checked.returncode == 0 and not about_us, checked.stderr


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_the_container_file_builds_what_is_here_and_starts_it_safely() -> None:
    """No container engine is needed to see a file that is missing or a bad flag; hadolint looks as
    well where it is installed.
    """
    found = instructions(CONTAINER.read_text())
    assert found[0][0] == "FROM" and {name for name, _ in found} <= INSTRUCTIONS
    for name, rest in found:
        if name == "COPY":
            missing = [one for one in rest.split()[:-1] if not (ROOT / one).exists()]
            assert not missing
    last = dict(found)
    assert last["USER"] not in ("root", "0")
    options = serve_flags(json.loads(last["ENTRYPOINT"]))
    assert has_keys(options) and str(options.port) == last["EXPOSE"]
    with pytest.raises(ValueError, match="can be reached"):
        check_exposure(options, Keys({}))
    assert ":" in found[0][1] and "latest" not in found[0][1]
    linter = shutil.which("hadolint")
    if linter is not None:
        checked = subprocess.run([linter, str(CONTAINER)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_a_bad_flag_in_an_example_would_be_found() -> None:
    """Guards the check itself."""
    with pytest.raises(ValueError, match="unrecognized"):
        serve_flags(["twotower", "serve", "--no-such-flag"])


def test_every_metric_is_explained_and_none_is_invented() -> None:
    """Guards docs/serving.md against figures that came or went."""
    zeros = dict.fromkeys(WorkerStats.__dataclass_fields__, 0)
    metrics = Metrics(lambda: WorkerStats(**zeros))  # type: ignore[arg-type]  # all are numbers
    there = {
        line.split()[2]
        for line in metrics.text().decode().splitlines()
        if line.startswith("# TYPE twotower_") and not line.split()[2].endswith("_created")
    }
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `(twotower_\w+)`", page, re.MULTILINE))
    assert told == there


def test_every_option_is_named_on_the_page() -> None:
    """Guards against a limit that nobody finds."""
    from twotower.serve.options import ServeOptions

    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    flags = {f"--{name.replace('_', '-')}" for name in ServeOptions.__dataclass_fields__}
    assert {flag for flag in flags if f"`{flag}" not in page} == set()
