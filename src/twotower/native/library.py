"""The C++ engine as a library: compiled once per machine with its own compiler, then loaded.

The structs that both sides know are declared in `layout`; where C++ uses another name, it does not
compile.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from twotower.native import layout
from twotower.native.layout import address

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "engine.cpp"
_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-ffp-contract=off", "-fPIC", "-shared", "-pthread",
)  # fmt: skip
_int = ctypes.c_int32


@cache
def library() -> ctypes.CDLL:
    """The compiled library, from the user's cache or made now. OSError says why there is none."""
    file = library_file()
    if not file.is_file():
        compile_library(_compiler(), file)
    return load_library(file)


def is_available() -> bool:
    """Whether this machine has the library, or can make it."""
    try:
        library()
    except OSError:
        return False
    return True


@cache
def library_file() -> Path:
    """Where the library lies or will lie: another name for each machine, compiler and source."""
    return Path.home() / ".cache" / "twotower" / f"native-{_fingerprint(_compiler())}.so"


def _compiler() -> str:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler; install g++ or clang++")
    return compiler


def load_library(file: Path) -> ctypes.CDLL:
    """A compiled library with the types of its functions."""
    found = ctypes.CDLL(str(file))
    found.twotower_pass.argtypes = [address, _int, address, *[_int] * 3, address]
    found.twotower_pass.restype = _int
    found.twotower_states.argtypes = [address, _int, _int, address, address]
    found.twotower_move.argtypes = [address, address, _int, _int, address, _int]
    found.twotower_linear.argtypes = [address, *[_int] * 3, address, _int, address]
    found.twotower_best.argtypes = [
        address, *[_int] * 3, address, _int, address, _int, address,
    ]  # fmt: skip
    found.twotower_bigrams.argtypes = [
        address, *[_int] * 3, address, address, ctypes.c_int64, address, _int, address,
    ]  # fmt: skip
    found.twotower_rank.argtypes = [
        address, *[_int] * 3, address, address, _int, address, address,
    ]  # fmt: skip
    found.twotower_pack.argtypes = [address, *[_int] * 5, address]
    for name in ("states", "move", "linear", "best", "bigrams", "rank", "pack"):
        getattr(found, f"twotower_{name}").restype = None
    return found


def _fingerprint(compiler: str) -> str:
    """What the library depends on: source, flags, compiler, and the processor it is made for."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    sources = [file.read_text() for file in (_SOURCE, *sorted(_FOLDER.glob("*.h")))]
    parts = [layout.header(), *sources, *_FLAGS, compiler, platform.machine(), *processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def compile_library(compiler: str, file: Path, more_flags: tuple[str, ...] = ()) -> None:
    """Make the library. OSError with the compiler's first error if it cannot."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        (Path(folder) / "layout.h").write_text(layout.header())
        command = [compiler, *_FLAGS, *more_flags, f"-I{folder}", str(_SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise OSError(f"{compiler} cannot compile {_SOURCE.name}: {reason}")
        os.replace(made, file)  # whole or not there, also beside another process
