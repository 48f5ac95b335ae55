"""What a model's program can do in the sandbox: compute, and nothing else. Tried as an attacker."""

import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twotower.lab.evaluate import sandbox as module
from twotower.lab.evaluate.sandbox import Protection, Ran, Sandbox, find_sandbox, holds

PARENT = os.getpid()
PROTECTIONS: tuple[Protection, ...] = ("bubblewrap", "namespaces", "landlock")


def is_offered(protection: Protection) -> bool:
    """Whether the machine has it, asked in another way than the code does."""
    if protection == "bubblewrap":
        if shutil.which("bwrap") is None:
            return False
        command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    elif protection == "namespaces":
        kinds = "CLONE_NEWUSER|CLONE_NEWNS|CLONE_NEWPID|CLONE_NEWNET"
        number = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000
        command = [sys.executable, "-c", f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare("
                   f"{number}))  # {kinds}"]  # fmt: skip
    else:
        command = [sys.executable, "-c", "import ctypes, sys; "
                   "sys.exit(ctypes.CDLL(None).syscall(444, None, 0, 1) < 1)"]  # fmt: skip
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module", params=PROTECTIONS)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    if not is_offered(request.param):
        pytest.skip(f"this machine offers no {request.param}")
    assert holds(request.param), f"{request.param} is there and does not hold"
    return Sandbox(request.param)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One CPU second: a busy machine may need many seconds of the wall for it."""
    monkeypatch.setattr(module, "CPU_SECONDS", 1)
    monkeypatch.setattr(module, "WALL_SECONDS", 60.0)


def attempt(sandbox: Sandbox, *lines: str) -> Ran:
    """A function of these lines that ends in 'done' if nothing stopped it."""
    body = "\n    ".join(["import os", *lines, "return 'done'"])
    return sandbox.run(f"def f():\n    {body}", "f", ["[]"])


def test_the_strongest_is_chosen_and_said() -> None:
    expected = next((name for name in PROTECTIONS if holds(name)), "audit hook")
    chosen = find_sandbox(allow_unsandboxed=True)
    assert chosen.protection == expected
    assert chosen.description.startswith("code that the model writes runs ")


def test_without_a_sandbox_an_explicit_yes_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent failure: a machine without namespaces runs a model's code as the user, unasked."""
    monkeypatch.setattr(module, "holds", lambda protection: False)
    with pytest.raises(ValueError, match="--allow-unsandboxed-code") as caught:
        find_sandbox()
    assert "\n" not in str(caught.value)
    assert "WITHOUT a sandbox" in find_sandbox(allow_unsandboxed=True).description


def test_a_protection_that_fails_its_trial_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silent failure: a sandbox program that exists but does nothing is taken for protection."""
    assert not holds("audit hook")  # it does not hide that the parent is there to be signalled
    monkeypatch.setattr(module.Sandbox, "_command", lambda *_: ["false"])
    assert not holds("namespaces")


def test_plain_programs_run(sandbox: Sandbox) -> None:
    names = "math re hashlib itertools functools typing random decimal json datetime collections"
    source = f"import {names.replace(' ', ', ')}\ndef f(a, b):\n    return math.gcd(a, b), 'é'"
    assert sandbox.run(source, "f", ["[4, 6]", "[3, 5]"]).results == ["(2, 'é')", "(1, 'é')"]
    assert sandbox.run("def f(n):\n    return 1 // n", "f", ["[1]", "[0]"]) == Ran(
        results=["1"], error="ZeroDivisionError"
    )


FILES = [
    "open({file!r}).read()",
    "open('/etc/passwd').read()",
    "open('/proc/self/environ').read()",
    "open('/proc/{parent}/environ').read()",
    "open('/proc/{parent}/mem', 'r+b')",
    "open('/proc/self/fd/0').read()",
    "open('/dev/shm/x', 'w')",
    "open({file!r}, 'w')",
    "open({file!r}, 'r+')",
    "open('/x', 'w')",
    "os.open({file!r}, os.O_TRUNC | os.O_WRONLY)",
    "os.open('/', os.O_TMPFILE | os.O_RDWR)",
    "os.remove({file!r})",
    "os.rename({file!r}, {file!r} + 'x')",
    "os.truncate({file!r}, 0)",
    "os.chmod({file!r}, 0)",
    "os.utime({file!r})",
    "os.mkdir({folder!r} + '/x')",
    "os.symlink('/etc', {folder!r} + '/x')",
    "os.listdir('/home')",
    "os.listdir({folder!r})",
    "os.chroot('/')",
    "__import__('tempfile').mkdtemp()",
]
PROCESSES = [
    "os.kill({parent}, 0)",
    "os.kill(-1, 9)",
    "os.killpg(0, 9)",
    "os.pidfd_open({parent})",
    "os.fork()",
    "os.system('true') == 0 or os.abort()",
    "os.posix_spawn('/bin/true', ['true'], {{}})",
    "os.execv(__import__('sys').executable, ['python', '-c', '1'])",
    "__import__('subprocess').run(['true'])",
    "__import__('multiprocessing').Process(target=print).start()",
    "__import__('threading').Thread(target=print).start()",
    "__import__('resource').prlimit({parent}, 0, (1, 1))",
    "__import__('resource').setrlimit(0, (60, 60))",
    "os.setpriority(os.PRIO_PROCESS, {parent}, 19)",
    "os.sched_setaffinity({parent}, [0])",
    "os.setuid(0)",
    "os.memfd_create('x')",
    "__import__('fcntl').fcntl(1, 8, {parent})",  # F_SETOWN: who gets the signals of a file
    "__import__('fcntl').ioctl(0, 0x5412, b'x')",  # TIOCSTI: keys typed into a terminal
]
NETWORK = [
    "__import__('socket').socket()",
    "__import__('socket').socket(__import__('socket').AF_UNIX)",
    "__import__('socket').socketpair()",
    "__import__('socket').socket(40, 1)",  # AF_VSOCK: to the host of a virtual machine
    "__import__('socket').create_connection(('127.0.0.1', 1))",
    "__import__('urllib.request').request.urlopen('http://example.com')",
]


@pytest.mark.parametrize("line", [*FILES, *PROCESSES, *NETWORK])
def test_nothing_outside_can_be_reached(line: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Silent failure: an answer reads or deletes the user's files, signals, connects or spawns."""
    file = tmp_path / "kept"
    file.write_text("text")
    file.chmod(0o666)
    written = line.format(file=str(file), folder=str(tmp_path), parent=PARENT)
    ran = attempt(sandbox, written)
    assert not ran.results and ran.error, ran
    assert file.read_text() == "text" and os.listdir(tmp_path) == ["kept"]
    assert resource.getrlimit(resource.RLIMIT_CPU)[1] != 1  # prlimit on the parent


CALLS = {
    "ptrace": "101, 16, {parent}, 0, 0",
    "kill": "62, {parent}, 0",
    "kill by another calling convention": "0x40000000 | 62, {parent}, 0",
    "tgkill": "234, {parent}, {parent}, 0",
    "process_vm_readv": "310, {parent}, 0, 0, 0, 0, 0",
    "clone": "56, 17, 0, 0, 0, 0",
    "vfork": "58",
    "clone3": "435, ctypes.create_string_buffer(88), 88",
    "unshare": "272, 0x10000000",
    "mount": "165, 0, 0, 0, 0, 0",
    "io_uring_setup": "425, 8, ctypes.create_string_buffer(200)",
    "openat2": "437, -100, b'/', 0, 0",
    "open_by_handle_at": "304, 0, 0, 0",
    "bpf": "321, 0, 0, 0",
    "keyctl": "250, 0, 0",
    "shmget": "29, 0, 4096, 0o1777",
    "perf_event_open": "298, 0, 0, 0, 0, 0",
    "userfaultfd": "323, 0",
    "timer_create": "222, 0, 0, 0",
    "prctl": "157, 4, 1, 0, 0, 0",
    "a call of a later kernel": "470",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
@pytest.mark.parametrize("name", CALLS)
def test_system_calls_that_are_not_needed_are_refused(name: str, sandbox: Sandbox) -> None:
    """Silent failure: ctypes goes past Python's functions straight to the kernel."""
    call = f"c.syscall({CALLS[name].format(parent=PARENT)})"
    lines = "import ctypes", "c = ctypes.CDLL(None, use_errno=True)", f"found = {call}"
    ran = attempt(sandbox, *lines, "if found < 0: raise OSError(ctypes.get_errno())")
    assert ran == Ran(results=[], error="OSError")


def test_only_the_standard_library_can_be_imported(sandbox: Sandbox) -> None:
    """Silent failure: a program imports this package and asks the corpus for the right answer."""
    import numpy

    places = [str(Path(numpy.__file__).parents[1]), str(Path(module.__file__).parents[3])]
    for place, name in zip(places, ("numpy", "twotower"), strict=True):
        ran = attempt(sandbox, "import sys", f"sys.path.append({place!r})", f"import {name}")
        assert not ran.results and ran.error in ("ModuleNotFoundError", "PermissionError"), ran


def test_installed_packages_are_hidden(sandbox: Sandbox) -> None:
    shown, hidden = module.visible_files()
    assert shown and hidden
    for folder in hidden:
        assert attempt(sandbox, f"if not os.listdir({folder!r}): raise KeyError").error


def test_there_is_no_environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    ran = sandbox.run("import os\ndef f():\n    return sorted(os.environ)", "f", ["[]"])
    assert set(eval(ran.results[0])) <= {"LC_CTYPE", "PWD"}  # set by interpreter and bubblewrap


FORGERIES = [
    # The record written by the program itself, through every descriptor that it can find.
    """
    import os
    for number in range(256):
        try:
            os.write(number, b'{"results": ["4", "-6"], "error": ""}')
        except OSError:
            pass
    os._exit(0)""",
    "\n    import os\n    os._exit(0)",
    "\n    import os\n    os.write(3, b'[' * 100_000)\n    os._exit(0)",
    '\n    print(\'{"results": ["4", "-6"], "error": ""}\')',
    # What the harness computes with, replaced under its feet.
    "\n    import builtins\n    builtins.repr = lambda value: '['\n    return n",
    # A value that claims to equal everything.
    """
    class Any(int):
        def __eq__(self, other): return True
        def __hash__(self): return 0
        def __repr__(self): return '4 or True'
    return Any(4)""",
    # The expected values, looked for in every frame above.
    """
    import sys
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if isinstance(value, dict) and 'expected' in value:
                return value['expected']
        frame = frame.f_back""",
]


@pytest.mark.parametrize("body", FORGERIES)
def test_a_verdict_cannot_be_forged_by_a_program_that_does_not_compute(
    body: str, sandbox: Sandbox
) -> None:
    """Silent failure: a program passes because it speaks for the checker.

    The first forgery knows the right answers; the test asks for other ones.
    """
    ran = sandbox.run(f"def double(n):{body}", "double", ["[5]", "[7]"])
    assert ran.results != ["10", "14"]
    assert all(len(result) <= module.RESULT_CHARS for result in ran.results)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["while True: pass"], "killed"),
        (["while True:", "    try:", "        while True: pass", "    except: pass"], "killed"),
        (
            ["import signal", "signal.signal(signal.SIGXCPU, signal.SIG_IGN)", "while True: pass"],
            "killed",
        ),
        (["os.write(3, b'x' * (1 << 24))", "os.write(3, b'x')"], "killed"),
        (["def g(): g()", "import sys", "sys.setrecursionlimit(1 << 30)", "g()"], "killed"),
        (["import ctypes", "ctypes.string_at(0)"], "killed"),
    ],
)
@pytest.mark.usefixtures("limits")
def test_time_and_output_are_bounded(lines: list[str], error: str, sandbox: Sandbox) -> None:
    """Silent failure: one answer takes the machine's disk, or the evaluation's day."""
    assert attempt(sandbox, *lines) == Ran(results=[], error=error)


def test_memory_is_bounded(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent failure: one answer takes the machine's memory. A busy host may need a second to give
    half a gigabyte, so the limit of time is far away.
    """
    monkeypatch.setattr(module, "CPU_SECONDS", 20)
    monkeypatch.setattr(module, "WALL_SECONDS", 60.0)
    lines = ["x = []", "while True: x.append(bytearray(1 << 20))"]
    assert attempt(sandbox, *lines) == Ran(results=[], error="MemoryError")


def test_endless_output_stays_small(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent failure: the evaluation itself reads gigabytes that a program wrote."""
    monkeypatch.setattr(module, "OUTPUT_BYTES", 1 << 16)
    for number in (1, 2):  # what is printed goes nowhere
        lines = f"for _ in range(1000): os.write({number}, b'x' * 4096)", "print('x' * 10_000_000)"
        assert attempt(sandbox, *lines).results == ["'done'"]
    sizes = []
    monkeypatch.setattr(module, "_read", lambda output: sizes.append(len(output)))
    attempt(sandbox, "os.write(3, b'x' * 100_000)")
    assert sizes == [1 << 16]  # the kernel's limit: without it one byte more would be read


def test_a_long_result_is_cut(sandbox: Sandbox) -> None:
    ran = sandbox.run("def f(n):\n    return 'x' * n", "f", ["[200000]", "[1]"])
    assert [len(result) for result in ran.results] == [module.RESULT_CHARS, 3] and not ran.error


def test_a_sleeping_function_ends_at_the_wall_clock(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: a run that waits forever uses no CPU seconds."""
    monkeypatch.setattr(module, "WALL_SECONDS", 0.5)
    before = jailed_processes()
    ran = attempt(sandbox, "import time", "time.sleep(60)")
    assert ran == Ran(results=[], error="timeout")
    assert have_ended(before)


def have_ended(before: set[str]) -> bool:
    """Whether every program's process but those of before is gone within some seconds."""
    deadline = time.monotonic() + 30
    while jailed_processes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    return not jailed_processes() - before


def jailed_processes() -> set[str]:
    """Living processes that run the jail, for this test process or as orphans."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if b"The inside of the sandbox" in command and parent in (1, PARENT):
            found.add(folder.name)
    return found


def test_a_program_does_not_outlive_the_evaluation(sandbox: Sandbox) -> None:
    """Silent failure: programs of a killed evaluation go on running unseen."""
    before = jailed_processes()
    code = (
        "from twotower.lab.evaluate.sandbox import Sandbox\n"
        f"Sandbox({sandbox.protection!r}).run("
        "'import time\\ndef f():\\n    time.sleep(600)', 'f', ['[]'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 60
    while not children_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert have_ended(before)


def children_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return ""


def test_an_unsandboxed_program_has_limits_and_may_not_write(tmp_path: Path) -> None:
    """What --allow-unsandboxed-code leaves: accidents are stopped, attacks are not."""
    unsandboxed = Sandbox("audit hook")
    file = tmp_path / "kept"
    file.write_text("text")
    for line in (f"os.remove({str(file)!r})", f"open({str(file)!r}, 'w')", "os.system('true')"):
        assert attempt(unsandboxed, line) == Ran(results=[], error="PermissionError")
    assert file.read_text() == "text"
    assert attempt(unsandboxed, "x = bytearray(1 << 40)").error == "MemoryError"
