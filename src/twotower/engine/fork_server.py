"""Work that a caller's input could crash, slow down or blow up, in processes of its own.

A fork server is a process that has loaded a program and copies itself when it is asked, in less
than a millisecond. A copy has a limit of memory, and every answer one of time; the system ends it
there, whatever the library in it is doing. It can take nothing with it: the other side of its
connection sees a closed socket.
"""

import contextlib
import logging
import os
import runpy
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twotower.engine import fork_server_child as child

_log = logging.getLogger(__name__)
_SLACK_S = 1.0  # beyond its time, for a process to be ended and for the answer to arrive
_MAX_REPLY = 256 << 20  # bytes of an answer


class ProcessDied(Exception):
    """The process has ended without an answer: it used up its memory or time, or crashed."""


class Forked:
    """A process of a fork server, reached through its connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._longest_s = 0.0  # that an answer may take

    def __del__(self) -> None:
        self._connection.close()

    def fork(self) -> "Forked":
        """A copy, which has all that this one has made until now. ProcessDied if there is none to
        be had.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:  # too many files are open
            raise ProcessDied(str(error)) from None
        copy = Forked(ours)
        with theirs, self._lock:
            self._send(child.FORK, b"", 0.0, _SLACK_S, [theirs.fileno()])
            self.receive()
        return copy

    def limit_memory(self, num_bytes: int) -> None:
        """Let this process, and its copies, grow by so much and no further."""
        with self._lock:
            self._send(child.LIMIT, str(num_bytes).encode(), 0.0, _SLACK_S)
            self.receive()

    def ask(self, request: bytes, cpu_s: float, wall_s: float) -> tuple[bytes, float]:
        """Both of the next two; for several threads."""
        with self._lock:
            self.send(request, cpu_s, wall_s)
            return self.receive()

    def send(self, request: bytes, cpu_s: float, wall_s: float) -> None:
        """Let the program work on an answer, which may take so many seconds."""
        self._send(child.ANSWER, request, cpu_s, wall_s)

    def _send(
        self, kind: bytes, request: bytes, cpu_s: float, wall_s: float, passed: Sequence[int] = ()
    ) -> None:
        self._longest_s = wall_s + _SLACK_S
        head = child.REQUEST.pack(kind, cpu_s, wall_s, len(request))
        with contextlib.suppress(OSError):  # which `receive` will raise
            self._connection.settimeout(self._longest_s)
            if passed:
                socket.send_fds(self._connection, [head], passed)
            else:
                self._connection.sendall(head + request)

    def receive(self) -> tuple[bytes, float]:
        """The first answer that has not been received, and the seconds of CPU time that the process
        has taken so far. ValueError with the program's words for what it refuses; ProcessDied.
        """
        try:
            self._connection.settimeout(self._longest_s)
            status, spent_s, size = child.REPLY.unpack(self._read(child.REPLY.size))
            content = self._read(size)
        except OSError as error:
            self._connection.close()  # an answer that comes late must not be taken for another
            raise ProcessDied(str(error)) from None
        if status == child.DONE:
            return content, spent_s
        message = content.decode(errors="replace")
        raise ValueError(message) if status == child.REFUSED else ProcessDied(message)

    def _read(self, size: int) -> bytes:
        if size > _MAX_REPLY:
            raise OSError(f"an answer of {size} bytes")
        parts = []
        while size:
            part = self._connection.recv(min(size, 1 << 20))
            if not part:
                raise OSError("it has ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class InThisProcess:
    """`Forked` without protection, for systems that cannot fork."""

    def __init__(self, program: object) -> None:
        self._program: Any = program
        self._requests: deque[bytes] = deque()

    def fork(self) -> "InThisProcess":
        return InThisProcess(self._program.copy())

    def limit_memory(self, num_bytes: int) -> None:
        """Nothing can be limited here."""

    def ask(self, request: bytes, cpu_s: float, wall_s: float) -> tuple[bytes, float]:
        return self._program.answer(request), 0.0

    def send(self, request: bytes, cpu_s: float, wall_s: float) -> None:
        self._requests.append(request)

    def receive(self) -> tuple[bytes, float]:
        return self._program.answer(self._requests.popleft()), 0.0


Process = Forked | InThisProcess  # where a program runs


def start(program: Path) -> Process:
    """A process with a program: a file that has a class `Program`, of the standard library and
    libraries that it imports itself. See `fork_server_child`.
    """
    if not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
        _log.warning("this system cannot fork: %s runs without limits", program.name)
        return InThisProcess(runpy.run_path(str(program))["Program"]())
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", child.__file__, str(program), str(theirs.fileno())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # a library's last words hold what a caller wrote
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is ours
        )
    started = Forked(ours)
    weakref.finalize(started, _end, ours, process)
    return started


class Root:
    """A process that is made ready once and copied from then on; made again should it be lost."""

    def __init__(self, program: Path, prepare: Callable[[Process], None]) -> None:
        """prepare: what to do with a process that has just loaded the program."""
        self._program, self._prepare = program, prepare
        self._process: Process | None = None
        self._lock = threading.Lock()

    def copy(self) -> Process:
        """A copy. ProcessDied when there is none to be had at present; what `prepare` raises."""
        with self._lock:
            try:
                if self._process is None:
                    process = start(self._program)
                    self._prepare(process)
                    self._process = process
                return self._process.fork()
            except (ProcessDied, OSError) as error:
                self._process = None
                raise ProcessDied(str(error)) from None


def _end(ours: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    ours.close()  # which ends it
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
