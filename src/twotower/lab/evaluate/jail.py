"""The inside of the sandbox: a script of the standard library alone that locks itself up, then runs
a model's Python.

`sandbox` starts it with `python -c` and a job (JSON) on stdin; it writes one JSON record to stdout.
Each protection is one function that ends in an OSError where the kernel refuses it: a sandbox that
is not whole runs nothing.
"""

import ast
import ctypes
import json
import os
import signal
import struct
import sys
from typing import Any

_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _NOEXEC, _RDONLY, _REMOUNT, _BIND, _REC = 2, 4, 8, 1, 32, 4096, 16384
_PRIVATE, _DETACH = 1 << 18, 2
_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38

# The only system calls that are let through, by their numbers on x86-64 and on arm64: enough to
# compute, to read the files that are there and to write to open descriptors. No call starts a
# process or a thread, signals, opens a socket or makes a file.
_CALLS = {
    "x86_64": (
        0xC000003E,
        "0 1 3 4 5 6 7 8 9 10 11 12 13 14 15 17 19 20 21 22 23 24 25 28 32 33 35 36 37 38 39 60 63 "
        "78 79 89 96 97 98 99 100 102 104 107 108 110 131 158 186 201 202 204 217 219 228 229 230 "
        "231 262 267 269 270 271 273 293 318 324 332 334 436 439",
    ),
    "aarch64": (
        0xC00000B7,
        "17 23 48 57 59 61 62 63 64 65 66 67 72 73 78 79 80 93 94 98 99 101 102 103 113 114 115 "
        "123 124 128 132 134 135 139 153 160 163 165 169 172 173 174 175 176 177 178 179 214 215 "
        "216 222 226 233 278 283 291 293 436 439",
    ),
}
# Calls that are let through with some values of one argument: (numbers, argument, bits that count,
# values). Files are opened to read; fcntl cannot name a process that gets signals.
_READ_ONLY = (0o1103, {0})  # no bit of O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_ARGUMENTS = (
    ({"x86_64": 2}, 1, *_READ_ONLY),  # open
    ({"x86_64": 257, "aarch64": 56}, 2, *_READ_ONLY),  # openat
    ({"x86_64": 72, "aarch64": 25}, 1, 0xFFFFFFFF, {0, 1, 2, 3, 1030}),  # fcntl
    ({"x86_64": 16, "aarch64": 29}, 1, 0xFFFFFFFF, {0x5401, 0x5450, 0x5451}),  # ioctl
)
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # refused calls fail with EPERM
_RULESET, _ADD_RULE, _RESTRICT = 444, 445, 446  # landlock's calls, the same everywhere
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3


def main() -> None:
    """Lock up as the job asks, run its program, write the record."""
    job = json.loads(sys.stdin.read())
    if sys.platform == "linux":
        die_with_parent()
    if job["protection"] == "namespaces":
        enter_namespaces(job["shown"], job["hidden"])
    limit_resources(job["limits"])
    if job["protection"] == "audit hook":
        watch()
    else:
        give_up_privileges()
        if job["protection"] == "landlock":
            restrict_files(job["shown"], job["hidden"])
        filter_calls()
    # The record leaves through what was stdout; what the program prints goes where stderr goes.
    record = os.dup(1)
    os.dup2(2, 0)
    os.dup2(2, 1)
    found = json.dumps(run(job)).encode()
    os.write(record, found)
    os._exit(0)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Execute the source and call its function with each list of arguments."""
    results: list[str] = []
    try:
        scope: dict[str, object] = {"__name__": "answer"}
        exec(job["source"], scope)
        for given in job["arguments"]:
            result = scope[job["name"]](*ast.literal_eval(given))  # type: ignore[operator]
            results.append(repr(result)[: job["result_chars"]])
        error = ""
    except BaseException as problem:
        error = type(problem).__name__
    return {"results": results, "error": error}


def limit_resources(limits: dict[str, int]) -> None:
    """Hard limits of this process, by their names in `resource`; Windows has none."""
    try:
        import resource
    except ImportError:
        return
    for name, value in limits.items():
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (value, value))


def watch() -> None:
    """Without a sandbox: refuse what a program does by accident. Hostile code gets around it."""
    looks = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
    changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def refuse(event: str, given: tuple[object, ...]) -> None:
        if event == "open":
            refused = bool((given[2] or 0) & changes)  # type: ignore[operator]
        elif event == "import":
            refused = given[0] in ("_posixsubprocess", "_socket", "_ctypes")
        else:
            refused = event.startswith(("socket.", "subprocess.", "ctypes.", "shutil.", "signal."))
            refused |= event.startswith("os.") and event not in looks
        if refused:
            raise PermissionError(event)

    sys.addaudithook(refuse)


def must(result: int, what: str) -> int:
    """The result of a C function; OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def give_up_privileges() -> None:
    """No capability, root or not, and no way to get one."""
    c = libc()
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)  # version 3, this process
    must(c.capset(header, none), "capset")
    must(c.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    must(c.prctl(_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def enter_namespaces(shown: list[str], hidden: list[str]) -> None:
    """Continue in a new process that sees no other process, no network and only `shown` files.

    Root makes the namespaces as root, anybody else inside a user namespace of their own.
    """
    c = libc()
    kinds = _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS
    user, group = os.geteuid(), os.getegid()
    if user != 0 or c.unshare(kinds) < 0:
        must(c.unshare(kinds | _NEWUSER), "unshare")
        maps = {"uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for file, text in {"setgroups": "deny", **maps}.items():
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(text)
    follow_child()  # the child is process 1 of the namespace: with it everything in there ends
    hide_files(c, shown, hidden)
    follow_child()  # and the program is not process 1, whose signals have exceptions


def follow_child() -> None:
    """Return in a child that dies with this process; this process ends when the child has ended."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    die_with_parent()


def die_with_parent() -> None:
    must(libc().prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def hide_files(c: ctypes.CDLL, shown: list[str], hidden: list[str]) -> None:
    """A root of its own: an empty file system with `shown` read-only, but for `hidden` in it."""
    root = os.getcwd()  # a fresh folder

    def mount(source: str, target: str, kind: str, flags: int) -> None:
        names = [text.encode() for text in (source, target, kind)]
        must(c.mount(*names, ctypes.c_ulong(flags), b"size=1m,mode=755" if kind else None), target)

    mount("none", "/", "", _REC | _PRIVATE)
    mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV)
    for path in shown:
        target = root + path
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            open(target, "x").close()
        mount(path, target, "", _BIND | _REC)
        kept = os.statvfs(target).f_flag & (_NOSUID | _NODEV | _NOEXEC)  # others' flags are locked
        mount("none", target, "", _BIND | _REMOUNT | _RDONLY | kept)
    for path in hidden:
        mount("tmpfs", root + path, "tmpfs", _NOSUID | _NODEV | _RDONLY)
    os.chdir(root)
    must(c.pivot_root(b".", b"."), "pivot_root")
    must(c.umount2(b".", _DETACH), "umount")
    os.chdir("/")
    mount("none", "/", "", _REMOUNT | _RDONLY | _NOSUID | _NODEV)


def restrict_files(shown: list[str], hidden: list[str]) -> None:
    """Landlock: only `shown` files can be opened, to read; whether others exist can be seen."""
    c = libc()
    version = must(c.syscall(_RULESET, None, 0, 1), "landlock")
    handled = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    rules = must(c.syscall(_RULESET, struct.pack("Q", handled), 8, 0), "landlock")
    for path in shown_below(shown, hidden):
        place = os.open(path, os.O_PATH)
        access = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        rule = struct.pack("=Qi", access, place)
        must(c.syscall(_ADD_RULE, rules, 1, rule, 0), f"landlock {path}")
        os.close(place)
    must(c.syscall(_RESTRICT, rules, 0), "landlock")
    os.close(rules)


def shown_below(shown: list[str], hidden: list[str]) -> list[str]:
    """`shown` paths, those that hold a hidden one replaced by what is beside it."""
    paths = []
    for path in shown:
        if path in hidden:
            continue
        if any(other.startswith(f"{path}/") for other in hidden):
            inner = [f"{path}/{name}" for name in os.listdir(path)]
            paths += shown_below([name for name in inner if os.path.exists(name)], hidden)
        else:
            paths.append(path)
    return paths


def filter_calls() -> None:
    """Let through the system calls of the table above and refuse all others, for good."""
    machine = os.uname().machine
    if machine not in _CALLS:
        raise OSError(f"no table of system calls for {machine}")
    code = call_filter(machine)
    program = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(program))
    must(libc().prctl(_SET_SECCOMP, 2, header, 0, 0), "seccomp")


def call_filter(machine: str) -> bytes:
    """The table as a program of the kernel's packet filter, 8 bytes an instruction."""
    architecture, numbers = _CALLS[machine]

    def step(code: int, value: int, is_so: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("HBBI", code, is_so, otherwise, value)

    allow, refuse = step(_RETURN, _ALLOW), step(_RETURN, _REFUSE)
    program = step(_LOAD, 4) + step(_EQUAL, architecture, 1, 0) + step(_RETURN, _KILL)
    program += step(_LOAD, 0)  # the call's number
    for number in map(int, numbers.split()):
        program += step(_EQUAL, number, 0, 1) + allow
    for calls, argument, bits, values in _ARGUMENTS:
        if machine in calls:
            tests = step(_LOAD, 16 + 8 * argument) + step(_AND, bits)
            for value in sorted(values):
                tests += step(_EQUAL, value, 0, 1) + allow
            tests += refuse
            program += step(_EQUAL, calls[machine], 0, len(tests) // 8) + tests
    return program + refuse


if __name__ == "__main__":
    main()
