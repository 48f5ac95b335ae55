"""The command lines of benchmarks: each says what it does, and what each of its flags means."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file
    for pattern in ("benchmarks/*.py", "benchmarks/*/*.py", "scripts/gpu/*.py")
    for file in ROOT.glob(pattern)
    # Locust would patch the modules of this process.
    if "__name__ ==" in file.read_text() and "import locust" not in file.read_text()
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_flag_is_explained(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: -h that begins an hour of measurements, and flags without a word."""
    made: list[argparse.ArgumentParser] = []
    init = argparse.ArgumentParser.__init__

    def noted(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", noted)
    monkeypatch.setattr(sys, "argv", [str(file), "-h"])
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises((SystemExit, ModuleNotFoundError)) as stop:
        runpy.run_path(str(file), run_name="__main__")
    if isinstance(stop.value, ModuleNotFoundError):
        pytest.skip(f"{stop.value.name} is not installed")
    assert stop.value.code == 0 and made[0].description
    bare = [action.dest for action in made[0]._actions if not action.help]
    assert bare == [] and "usage: " in capsys.readouterr().out
