"""What runs in the processes of a fork server: a script, so that they load nothing of ours.

    python -P fork_server_child.py PROGRAM SOCKET

PROGRAM is a file with a class `Program`, whose `answer(request)` does the work; SOCKET a file
descriptor. A process answers one connection, in order. It can be asked to copy itself for another
connection: the copy has all that the process had made until then. It ends with its connection, or
when an answer uses up its time or its memory, whatever the library behind it is doing.
"""

import contextlib
import gc
import os
import runpy
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

# A request: what for, seconds of CPU, seconds in all, bytes that follow.
REQUEST = struct.Struct("<cddQ")
ANSWER, FORK, LIMIT = b"a", b"f", b"l"
# A reply: how it went, seconds of CPU that the process has taken so far, bytes that follow.
REPLY = struct.Struct("<cdQ")
DONE, REFUSED, FAILED = b"d", b"r", b"f"


def serve(connection: socket.socket, answer: Callable[[bytes], bytes]) -> None:
    """Answer until the other side has closed the connection."""
    while True:
        kind, cpu_s, wall_s, content, descriptors = _receive(connection)
        if kind == FORK:
            connection = _fork(connection, descriptors[0])
        elif kind == LIMIT:
            _limit_memory(int(content))
            _reply(connection, DONE)
        else:
            _set_alarms(cpu_s, wall_s)
            status, content = _answered(answer, content)
            _set_alarms(0.0, 0.0)
            _reply(connection, status, content)


def _reply(connection: socket.socket, status: bytes, content: bytes = b"") -> None:
    try:
        connection.sendall(REPLY.pack(status, time.process_time(), len(content)) + content)
    except OSError:  # nobody waits for it any more
        os._exit(0)


def _receive(connection: socket.socket) -> tuple[bytes, float, float, bytes, list[int]]:
    head, descriptors, _, _ = socket.recv_fds(connection, REQUEST.size, 1)
    head += _read(connection, REQUEST.size - len(head))
    kind, cpu_s, wall_s, size = REQUEST.unpack(head)
    return kind, cpu_s, wall_s, _read(connection, size), descriptors


def _read(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            os._exit(0)  # without giving back memory, which would copy it first
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _fork(connection: socket.socket, descriptor: int) -> socket.socket:
    """The connection of the process that we are from now on: the old one or its copy."""
    try:
        if os.fork() == 0:
            connection.close()
            return socket.socket(fileno=descriptor)
        _reply(connection, DONE)
    except OSError as error:
        _reply(connection, FAILED, _message(error))
    os.close(descriptor)
    return connection


def _answered(answer: Callable[[bytes], bytes], request: bytes) -> tuple[bytes, bytes]:
    try:
        return DONE, answer(request)
    except ValueError as error:
        return REFUSED, _message(error)
    except BaseException as error:  # a library's panic is none of Exception
        return FAILED, _message(error)


def _message(error: BaseException) -> bytes:
    return f"{str(error) or type(error).__name__}"[:2000].encode(errors="replace")


def _limit_memory(num_bytes: int) -> None:
    """Let this process and its copies grow by so much and no further."""
    import resource  # not everywhere, and this file's formats are read everywhere

    pages = Path("/proc/self/statm")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if pages.exists():
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes,) * 2)


def _set_alarms(cpu_s: float, wall_s: float) -> None:
    """Let the system end this process when its time is over; 0 for never."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def main() -> None:
    """Serve the program that the command line names."""
    import resource

    for name in (signal.SIGINT, signal.SIGTERM):  # whoever started us ends us
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # copies leave nothing behind
    with contextlib.suppress(OSError):  # first of all when the machine's memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    gc.disable()  # it would touch, and so copy, all that copies share
    program, descriptor = sys.argv[1:]
    serve(socket.socket(fileno=int(descriptor)), runpy.run_path(program)["Program"]().answer)


if __name__ == "__main__":
    main()
