"""The C++ pass of native.cpp: compiled once per machine with its own compiler, called by address.

Decides where the library lies and what a tower looks like to it; which passes go there is the
model's business.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from twotower.config import AttentionSpec, MambaSpec, MLPSpec, TowerConfig
from twotower.kernels.int8 import Packed
from twotower.kernels.quantised import Quantised

MAX_TOKENS = 16  # of one pass: the lanes of the widest vector
KINDS = "M*-"  # layers that it knows
# Weights from this many on stream from memory, and threads share them: below, it costs more to wake
# another than it helps.
LARGE = 4_000_000
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-fPIC", "-shared", "-pthread",
)  # fmt: skip
_WEIGHTS = {
    "M": "in_proj.weight in_proj.bias conv1d.weight conv1d.bias dt_bias A_log D norm.weight "
    "out_proj.weight out_proj.bias",
    "*": "q_proj.weight q_proj.bias k_proj.weight k_proj.bias v_proj.weight v_proj.bias "
    "o_proj.weight o_proj.bias",
    "-": "up_proj.weight up_proj.bias down_proj.weight down_proj.bias",
}
_PER_LAYER = 11  # addresses of a layer: its norm, then its kind's, then none

_address = ctypes.c_void_p


_INTEGERS = (
    "vocabulary", "width", "q_heads", "kv_heads", "head_dim", "heads", "head_size", "groups",
    "state", "taps", "inner",
)  # fmt: skip


class _Weight(ctypes.Structure):
    _fields_ = [("wide", _address), ("packed", _address)]


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in _INTEGERS] + [("eps", ctypes.c_float)]


class _Tower(ctypes.Structure):
    _fields_ = [
        ("sizes", _address),
        ("kinds", ctypes.c_char_p),
        ("embeddings", _address),
        ("norm", _address),
        ("weights", _address),
    ]


def _sizes(config: TowerConfig) -> _Sizes:
    """The sizes of a tower; ValueError (one line) if layers of a kind differ."""
    attention, mamba = config.shared_spec(AttentionSpec), config.shared_spec(MambaSpec)
    mlp = config.shared_spec(MLPSpec)
    heads = (attention.num_heads, attention.num_kv_heads, attention.head_dim) if attention else ()
    scan = (
        (mamba.num_heads, mamba.head_dim, mamba.num_groups, mamba.state_size, mamba.conv_width)
        if mamba
        else ()
    )
    return _Sizes(
        config.vocab_size, config.hidden_size, *(heads or [1] * 3), *(scan or [1] * 5),
        mlp.intermediate_size if mlp else 1, config.norm_eps,
    )  # fmt: skip


class TowerPass:
    """One tower's weights as the library sees them: addresses, no copies but of int8 matrices.

    weights: the tower's parameters by name, float32 and contiguous, which must stay where they are.
    is_causal: whether a token is hidden from those before it. matrices: what is int8, by name.
    """

    def __init__(
        self,
        config: TowerConfig,
        weights: Mapping[str, Tensor],
        is_causal: bool,
        matrices: Mapping[str, Tensor | Quantised],
    ) -> None:
        self._is_causal = is_causal
        packed = Packed(matrices)
        self._kept = weights, packed  # the addresses below stay valid as long as these live
        num_weights = sum(w.numel() for w in weights.values()) + packed.num_bytes
        self._is_shared = num_weights >= LARGE
        self._sizes = _sizes(config)
        found = []
        for index, kind in enumerate(config.pattern):
            names = ["norm.weight", *(f"mixer.{name}" for name in _WEIGHTS[kind].split())]
            found += [_weight(f"layers.{index}.{name}", weights, packed) for name in names]
            found += [_Weight()] * (_PER_LAYER - len(names))
        self._weights = (_Weight * len(found))(*found)
        self._tower = _Tower(
            ctypes.addressof(self._sizes),
            config.pattern.encode(),
            weights["embeddings.weight"].data_ptr(),
            weights["norm_f.weight"].data_ptr(),
            ctypes.addressof(self._weights),
        )
        self._run, self._run_states = library().twotower_pass, library().twotower_states

    def __call__(
        self,
        ids: Tensor,
        num_past: int,
        states: tuple[int, int | None],
        hidden: Tensor,
        modulations: "Modulations | None" = None,
    ) -> None:
        """ids (L,) int64 of one row, 1 <= L <= MAX_TOKENS; fills hidden (L, D), normed, and states.

        states: address of the addresses, layer by layer, of k, v, conv, ssm before the pass, and of
        where it leaves k, v, window, mixed, step, ssm; 0 or None where nobody asks.
        """
        past, fresh = states
        if self._run(
            ctypes.byref(self._tower), ids.shape[0], num_past, self._is_causal,
            torch.get_num_threads() if self._is_shared else 1,
            ids.data_ptr(), modulations and modulations.address, past, fresh, hidden.data_ptr(),
        ):  # fmt: skip
            raise IndexError(f"token ids {ids.tolist()} leave the vocabulary")

    def fill_states(self, count: int, past: int, fresh: int) -> None:
        """The Mamba states after the first `count` of the tokens whose inputs a pass has left.

        past, fresh: addresses as in a pass; fresh has the inputs and room for the states.
        """
        num_threads = torch.get_num_threads() if self._is_shared else 1
        self._run_states(ctypes.byref(self._tower), count, num_threads, past, fresh)


class Modulations:
    """Shift, scale and gate (layers, 3, D), contiguous, and where those of each layer begin."""

    def __init__(self, table: Tensor) -> None:
        first, step = table.data_ptr(), 4 * table.stride(0)
        self._kept = table
        self._layers = (_address * len(table))(*range(first, first + len(table) * step, step))
        self.address = ctypes.addressof(self._layers)


def _weight(name: str, weights: Mapping[str, Tensor], packed: Packed) -> _Weight:
    wide = weights.get(name)
    return _Weight(None if wide is None else wide.data_ptr(), packed.addresses.get(name))


class Linear:
    """x (..., K) -> (..., N) float32 by a weight (N, K), float32 or int8, as a pass has it."""

    def __init__(self, weight: Tensor | Quantised) -> None:
        wide = {"": weight} if isinstance(weight, Tensor) else {}
        packed = Packed({} if isinstance(weight, Tensor) else {"": weight})
        self._kept = weight, packed
        numbers = weight if isinstance(weight, Tensor) else weight.qdata
        self._rows, self._width = numbers.shape
        self._is_shared = numbers.numel() >= LARGE
        self._weight = _weight("", wide, packed)
        self._run = library().twotower_linear

    def __call__(self, x: Tensor) -> Tensor:
        """x float32."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._rows)
        self._run(
            ctypes.byref(self._weight), self._rows, self._width,
            torch.get_num_threads() if self._is_shared else 1,
            x.data_ptr(), x.numel() // self._width, y.data_ptr(),
        )  # fmt: skip
        return y


@cache
def library() -> ctypes.CDLL:
    """The compiled library, from the user's cache or made now. OSError says why there is none."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler; install g++ or clang++")
    file = Path.home() / ".cache" / "twotower" / f"native-{_fingerprint(compiler)}.so"
    if not file.is_file():
        compile_library(compiler, file)
    return load_library(file)


def load_library(file: Path) -> ctypes.CDLL:
    """A compiled library with the types of its functions."""
    found = ctypes.CDLL(str(file))
    found.twotower_pass.argtypes = [
        _address, *[ctypes.c_int32] * 4, _address, _address, _address, _address, _address,
    ]  # fmt: skip
    found.twotower_states.argtypes = [_address, *[ctypes.c_int32] * 2, _address, _address]
    found.twotower_linear.argtypes = [
        _address, *[ctypes.c_int32] * 3, _address, ctypes.c_int32, _address,
    ]  # fmt: skip
    found.twotower_pass.restype = ctypes.c_int32
    found.twotower_states.restype = found.twotower_linear.restype = None
    return found


def _fingerprint(compiler: str) -> str:
    """What the library depends on: source, flags, compiler, and the processor it is made for."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    sources = [file.read_text() for file in (_SOURCE, *sorted(_SOURCE.parent.glob("native_*.h")))]
    parts = [*sources, *_FLAGS, compiler, platform.machine(), *processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def compile_library(compiler: str, file: Path, more_flags: tuple[str, ...] = ()) -> None:
    """Make the library. OSError with the compiler's first line if it cannot."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [compiler, *_FLAGS, *more_flags, str(_SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise OSError(f"{compiler} cannot compile {_SOURCE.name}: {reason}")
        os.replace(made, file)  # whole or not there, also beside another process
