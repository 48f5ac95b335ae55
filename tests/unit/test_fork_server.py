"""Processes that copy themselves: what they may take, and that they take nothing with them."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.engine import fork_server
from twotower.engine.fork_server import InThisProcess, Process, ProcessDied

PROGRAM = """
import ctypes, os, sys, time

class Panic(BaseException):
    pass

class Program:
    known = 0

    def copy(self):
        other = Program()
        other.known = self.known
        return other

    def answer(self, request):
        match request.decode().split():
            case ["know", number]:
                self.known += int(number)
            case ["refuse"]:
                raise ValueError("not\\nthat")
            case ["panic"]:
                raise Panic("lost")
            case ["spin"]:
                while True:
                    pass
            case ["sleep"]:
                time.sleep(60)
            case ["crash"]:
                ctypes.string_at(0)
            case ["leave"]:
                os._exit(0)
            case ["grow", megabytes]:
                self.kept = bytearray(int(megabytes) << 20)
            case ["write"]:
                os.write(os.open(sys.argv[1] + ".written", os.O_CREAT | os.O_WRONLY), b"x")
            case ["echo", text]:
                return text.encode()
            case ["pid"]:
                return str(os.getpid()).encode()
        return str(self.known).encode()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Process:
    file = tmp_path_factory.mktemp("program") / "program.py"
    file.write_text(PROGRAM)
    started = fork_server.start(file)
    say(started, "know 1")
    started.limit_memory(64 << 20)
    return started


def say(process: Process, request: str, cpu_s: float = 5.0, wall_s: float = 10.0) -> str:
    return process.ask(request.encode(), cpu_s, wall_s)[0].decode()


def test_a_copy_has_what_was_made_and_goes_its_own_way(root: Process) -> None:
    """Guards texts of two rows in one grammar."""
    first = root.fork()
    assert say(first, "know 10") == "11"
    second = first.fork()
    assert say(second, "know 100") == "111"
    assert say(first, "know 0") == "11" and say(root, "know 0") == "1"


@pytest.mark.parametrize("deed", ["spin", "sleep", "crash", "leave", "panic", "grow 500", "write"])
def test_what_goes_wrong_ends_one_process_in_time(root: Process, deed: str) -> None:
    """Guards a server that a library takes with it, or that waits for one that never answers."""
    culprit = root.fork()
    neighbour = culprit.fork()
    pid, start = int(say(culprit, "pid")), time.monotonic()
    with pytest.raises(ProcessDied):
        say(culprit, deed, cpu_s=0.3, wall_s=1.0 if deed == "sleep" else 30.0)
    assert time.monotonic() - start < 5
    if deed not in ("panic", "write", "grow 500"):  # of which it is told
        wait_until(lambda: not is_running(pid))
    assert say(neighbour, "know 5") == "6" and say(root, "know 0") == "1"


def test_a_limit_of_time_is_of_each_answer(root: Process) -> None:
    process = root.fork()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert say(process, "know 0", cpu_s=0.3, wall_s=0.3) == "1"


def test_memory_within_the_limit_may_be_used(root: Process) -> None:
    assert say(root.fork(), "grow 20") == "1"


def test_a_refusal_is_told_and_the_process_goes_on(root: Process) -> None:
    process = root.fork()
    with pytest.raises(ValueError, match="not\nthat"):
        say(process, "refuse")
    assert say(process, "know 2") == "3"


def test_answers_come_in_the_order_of_the_questions(root: Process) -> None:
    process = root.fork()
    for number in (1, 2, 3):
        process.send(f"know {number}".encode(), 1.0, 1.0)
    assert [process.receive()[0] for _ in range(3)] == [b"2", b"4", b"7"]


def test_a_large_request_and_answer_arrive(root: Process) -> None:
    text = "text" * 1_000_000
    assert say(root.fork(), f"echo {text}") == text


def test_a_process_ends_with_its_connection(root: Process) -> None:
    """Guards processes that stay for ever, and with them the memory of every row."""
    process = root.fork()
    pid = int(say(process, "pid"))
    inner = process.fork()
    inner_pid = int(say(inner, "pid"))
    del process
    wait_until(lambda: not is_running(pid))
    assert is_running(inner_pid), "a copy does not depend on what it was copied from"
    del inner
    wait_until(lambda: not is_running(inner_pid))


def test_no_copy_of_what_has_ended(root: Process) -> None:
    process = root.fork()
    with pytest.raises(ProcessDied):
        say(process, "leave")
    with pytest.raises(ProcessDied):
        process.fork()


def test_ctrl_c_and_a_stop_are_not_for_them(root: Process) -> None:
    """Guards rows that are to be finished after a signal to stop, which services send to all."""
    process = root.fork()
    pid = int(say(process, "pid"))
    for signal in (2, 15):
        os.kill(pid, signal)
    assert say(process, "know 1") == "2"


def test_the_same_without_processes(tmp_path: Path) -> None:
    """Guards systems that cannot fork."""
    space: dict[str, type] = {}
    exec(PROGRAM, space)
    process: Process = InThisProcess(space["Program"]())
    assert say(process, "know 1") == "1"
    copy = process.fork()
    assert say(copy, "know 1") == "2" and say(process, "know 0") == "1"
    copy.send(b"know 3", 1.0, 1.0)
    copy.send(b"know 3", 1.0, 1.0)
    assert copy.receive()[0] == b"5" and copy.receive()[0] == b"8"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)
