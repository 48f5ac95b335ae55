"""What the verbs that measure share: output folder, libraries, the sandbox."""

import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import twotower
from twotower.lab.evaluate.sandbox import Sandbox, find_sandbox
from twotower.lab.evaluate.suite import EXECUTED

INTERRUPTED = 130  # exit status, as a shell reports Ctrl-C


def open_folder(folder: Path) -> None:
    """Make the output folder; ValueError, before the run, if nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or "not writable"
        raise ValueError(f"output: cannot write into {folder} ({reason}); use another") from None


def require_library(name: str) -> None:
    """ImportError, before the run, for a library that only its end would miss."""
    if find_spec(name) is None:
        raise ImportError(f'{name} is not installed: pip install ".[eval]"')


def open_sandbox(categories: Sequence[str], allow_unsandboxed: bool) -> Sandbox | None:
    """The sandbox for what these categories execute, if anything; ValueError as `find_sandbox`."""
    return find_sandbox(allow_unsandboxed) if EXECUTED.keys() & set(categories) else None


def say_protection(sandbox: Sandbox | None) -> None:
    """Which protection is on, on stderr."""
    if sandbox is not None:
        print(sandbox.description, file=sys.stderr)


def describe_versions(*libraries: str) -> dict[str, str | None]:
    """Ours, Python's, the system's, the libraries'; None for a library that is missing."""
    found: dict[str, str | None] = {
        "twotower": twotower.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in ("torch", *libraries):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
