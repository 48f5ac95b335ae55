"""Where a model's Python runs: the strongest sandbox that this machine offers, tried before use.

Expected values never enter the process that runs a model's text, so that text which prints, exits,
patches or writes to the result can forge nothing that it could not compute. `jail` is what runs
inside; this file chooses the protection, feeds it and reads what comes back, which may be hostile.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

CPU_SECONDS = 2
WALL_SECONDS = 20.0  # for what waits; a busy machine needs many times the CPU seconds
MEMORY_BYTES = 512 << 20
RESULT_CHARS = 10_000  # of each result
OUTPUT_BYTES = 8 << 20  # of all results: the largest file that the process can write

Protection = Literal["bubblewrap", "namespaces", "landlock", "audit hook"]
_CLOSED = "no files of yours, no network, no other processes, a filter of system calls"
_WORDS: dict[Protection, str] = {
    "bubblewrap": f"in a bubblewrap sandbox ({_CLOSED})",
    "namespaces": f"in a sandbox of kernel namespaces ({_CLOSED})",
    "landlock": "in a landlock sandbox (no files of yours can be opened, a filter of system calls)",
    "audit hook": "WITHOUT a sandbox (limits of time and memory; hostile code is not stopped)",
}
# What is tried in the sandbox before it is believed in: it must see none of these.
_TRIAL = """
import os
def attempt(action):
    try:
        action()
    except OSError:
        return False
    return True
def trial(path, parent):
    import socket
    return [attempt(lambda: open(path)), attempt(lambda: open(path + "2", "w")),
            attempt(os.fork), attempt(socket.socket), attempt(lambda: os.kill(parent, 0))]
"""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a call returned, as `repr` texts in order, and why it stopped early ("" if not)."""

    results: list[str]
    error: str


@dataclass(frozen=True)
class Sandbox:
    """One way to run a model's Python."""

    protection: Protection

    @property
    def description(self) -> str:
        """Which protection is on: one line for the user."""
        return f"code that the model writes runs {_WORDS[self.protection]}"

    def run(
        self, source: str, name: str, arguments: Sequence[str], result_chars: int = RESULT_CHARS
    ) -> Ran:
        """Execute `source` and call its function `name`; each of `arguments` is a literal list."""
        shown, hidden = visible_files()
        job = {
            "source": source,
            "name": name,
            "arguments": list(arguments),
            "result_chars": result_chars,
            "protection": self.protection,
            "shown": shown,
            "hidden": hidden,
            "limits": {
                "RLIMIT_CPU": CPU_SECONDS,
                "RLIMIT_AS": MEMORY_BYTES,
                "RLIMIT_FSIZE": OUTPUT_BYTES,
                "RLIMIT_NOFILE": 32,
                "RLIMIT_NPROC": 0,
                "RLIMIT_CORE": 0,
            },
        }
        with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as output:
            asked.write(json.dumps(job).encode())
            asked.seek(0)
            with tempfile.TemporaryDirectory() as folder:
                is_over = _run_process(self._command(shown, hidden), asked, output, folder)
            if not is_over:
                return Ran(results=[], error="timeout")
            output.seek(0)
            return _read(output.read(OUTPUT_BYTES + 1))

    def _command(self, shown: Sequence[str], hidden: Sequence[str]) -> list[str]:
        python = os.path.realpath(sys.executable)
        inner = [python, "-I", "-S", "-B", "-c", jail_source()]
        if self.protection != "bubblewrap":
            return inner
        command = [
            "bwrap",
            "--unshare-all",
            "--die-with-parent",
            "--new-session",
            "--cap-drop",
            "ALL",
        ]
        for path in [*shown, python]:
            command += ["--ro-bind", path, path]
        for path in hidden:
            command += ["--tmpfs", path]
        return [*command, "--remount-ro", "/", "--chdir", "/", "--", *inner]


def find_sandbox(allow_unsandboxed: bool = False) -> Sandbox:
    """The first protection that holds here; without any, ValueError unless that is allowed."""
    tried: list[Protection] = ["bubblewrap", "namespaces", "landlock"]
    for protection in tried if sys.platform == "linux" else []:
        if holds(protection):
            return Sandbox(protection)
    if allow_unsandboxed:
        return Sandbox("audit hook")
    raise ValueError(
        "the category code runs what the model writes, and this machine has no sandbox for it "
        "(bubblewrap, or namespaces or landlock of a Linux kernel); install bubblewrap, leave the "
        "category out, or accept the risk with --allow-unsandboxed-code"
    )


def holds(protection: Protection) -> bool:
    """Whether a program runs there and can neither open, fork, connect nor see this process."""
    if protection == "bubblewrap" and shutil.which("bwrap") is None:
        return False
    with tempfile.NamedTemporaryFile() as file:
        ran = Sandbox(protection).run(_TRIAL, "trial", [repr([file.name, os.getpid()])])
    return ran.results == [repr([False] * 5)]


@cache
def jail_source() -> str:
    return Path(__file__).with_name("jail.py").read_text(encoding="utf-8")


@cache
def visible_files() -> tuple[list[str], list[str]]:
    """What a program may read, the standard and system libraries, and packages hidden in there."""
    platform_paths = {"platbase": sys.base_exec_prefix}  # not those of a virtual environment
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars=platform_paths)]
    paths += [str(sysconfig.get_config_var("LIBDIR")), "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    shown: list[str] = []
    for path in sorted(set(paths), key=len):
        if Path(path).is_dir() and not any(path.startswith(f"{other}/") for other in shown):
            shown.append(path)
    hidden = [
        str(found)
        for path in shown
        for pattern in ("*-packages", "python3*/*-packages")
        for found in sorted(Path(path).glob(pattern))
    ]
    return shown, hidden


def _run_process(command: Sequence[str], asked: IO[bytes], output: IO[bytes], folder: str) -> bool:
    """Run to the end with everything that it started; whether it ended by itself."""
    process = subprocess.Popen(
        command,
        stdin=asked,
        stdout=output,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        start_new_session=True,
    )
    try:
        return _wait(process, WALL_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether it ended in time."""
    if sys.platform == "linux":  # without the pauses between the looks of Popen.wait
        handle = os.pidfd_open(process.pid)
        try:
            return bool(select.select([handle], [], [], seconds)[0])
        finally:
            os.close(handle)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _read(output: bytes) -> Ran:
    """The process's record, or an error for anything else: killed at a limit, or written over."""
    try:
        record = json.loads(output)
        return Ran(results=[str(item) for item in record["results"]], error=str(record["error"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return Ran(results=[], error="killed")
