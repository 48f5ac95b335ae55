"""Run a model's Python in a process of its own, under limits, and get back what it returned.

Decides nothing about right or wrong: expected values never enter the process, so text that prints,
exits or writes to the result pipe can forge nothing that it could not compute. Limits: CPU seconds,
memory, open files, no file writes, no environment, an empty folder. It is no jail for hostile code:
the network and the files that the user may read are not hidden.
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
WALL_SECONDS = 10.0
MEMORY_BYTES = 512 << 20
OUTPUT_BYTES = 1 << 20

# Runs in the child, before any of the model's text. Results leave through a pipe of their own.
_HARNESS = """
import ast, json, os, sys
try:
    import resource
except ImportError:
    resource = None
pipe = os.fdopen(int(sys.argv[1]), "w")
job = json.loads(sys.stdin.read())
if resource is not None:
    cpu, memory = job["cpu_seconds"], job["memory_bytes"]
    for what, limit in (("RLIMIT_CPU", cpu), ("RLIMIT_AS", memory), ("RLIMIT_FSIZE", 0),
                        ("RLIMIT_NOFILE", 16), ("RLIMIT_CORE", 0)):
        resource.setrlimit(getattr(resource, what), (limit, limit))
results = []
try:
    scope = {"__name__": "answer"}
    exec(job["source"], scope)
    function = scope[job["name"]]
    for given in job["arguments"]:
        results.append(repr(function(*ast.literal_eval(given))))
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
        }
    )
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder, os.fdopen(reader, "rb") as results:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _HARNESS, str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writer,),
            cwd=folder,
            env={},
            start_new_session=True,
        )
        os.close(writer)
        try:
            process.communicate(job.encode(), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            return Ran(results=[], error="timeout")
        finally:
            _kill(process)
        return _read(results.read(OUTPUT_BYTES))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(output: bytes) -> Ran:
    """The child's record, or an error for anything else: killed at a limit, or written over."""
    try:
        record = json.loads(output)
        return Ran(results=[str(item) for item in record["results"]], error=str(record["error"]))
    except (ValueError, KeyError, TypeError):
        return Ran(results=[], error="killed")
