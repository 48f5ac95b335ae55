"""Run a model's Python in a process of its own, under limits, and get back what it returned.

Decides nothing about right or wrong: expected values never enter the process, so text that prints,
exits or writes to the result pipe can forge nothing that it could not compute. Limits: CPU seconds,
memory, open files, no environment, an empty folder; an audit hook refuses to write, rename or
remove files, to start or signal processes, and to open sockets. It stops what a model may write by
accident. It is no jail for hostile code: the files that the user may read are not hidden.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

CPU_SECONDS = 2
WALL_SECONDS = 20.0  # for what waits; a busy machine needs many times the CPU seconds
MEMORY_BYTES = 512 << 20
RESULT_CHARS = 10_000  # of each result; more than a pipe holds would stop the process

# Runs in the child, before any of the model's text. Results leave through what was stdout.
_HARNESS = """
import ast, json, os, sys
try:
    import resource
except ImportError:
    resource = None
pipe = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
job = json.loads(sys.stdin.read())
if resource is not None:
    cpu, memory = job["cpu_seconds"], job["memory_bytes"]
    for what, limit in (("RLIMIT_CPU", cpu), ("RLIMIT_AS", memory), ("RLIMIT_FSIZE", 0),
                        ("RLIMIT_NOFILE", 16), ("RLIMIT_CORE", 0)):
        resource.setrlimit(getattr(resource, what), (limit, limit))
looks = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
closed = ("socket.", "subprocess.", "ctypes.", "shutil.", "signal.")
writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
def watch(event, given):
    if event == "open":
        refused = (given[2] or 0) & writes
    elif event == "import":
        refused = given[0] in ("_posixsubprocess", "_socket", "_ctypes")
    else:
        refused = event.startswith(closed) or event.startswith("os.") and event not in looks
    if refused:
        raise PermissionError(event)
results = []
sys.addaudithook(watch)
try:
    scope = {"__name__": "answer"}
    exec(job["source"], scope)
    function = scope[job["name"]]
    for given in job["arguments"]:
        results.append(repr(function(*ast.literal_eval(given)))[:job["result_chars"]])
    error = ""
except BaseException as problem:
    error = type(problem).__name__
pipe.write(json.dumps({"results": results, "error": error}))
pipe.close()
os._exit(0)
"""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a call returned, as `repr` texts in order, and why it stopped early ("" if not)."""

    results: list[str]
    error: str


def run_function(source: str, name: str, arguments: Sequence[str]) -> Ran:
    """Execute `source` and call its function `name`; each of `arguments` is a literal list."""
    job = json.dumps(
        {
            "source": source,
            "name": name,
            "arguments": list(arguments),
            "cpu_seconds": CPU_SECONDS,
            "memory_bytes": MEMORY_BYTES,
            "result_chars": RESULT_CHARS,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _HARNESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(job.encode(), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            return Ran(results=[], error="timeout")
        finally:
            _kill(process)
        return _read(output)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _read(output: bytes) -> Ran:
    """The child's record, or an error for anything else: killed at a limit, or written over."""
    try:
        record = json.loads(output)
        return Ran(results=[str(item) for item in record["results"]], error=str(record["error"]))
    except (ValueError, KeyError, TypeError):
        return Ran(results=[], error="killed")
