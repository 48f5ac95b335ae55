"""A tower, and a head, as the library runs them: one call a pass."""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twotower.native import layout
from twotower.native.layout import Row, Weight
from twotower.native.library import library

# Weights from this many on stream from memory, and threads share them: below, it costs more to wake
# another than it helps.
LARGE = 4_000_000


class NativeTower:
    """One tower's passes.

    is_causal: whether a token is hidden from those before it. kept: what the struct's addresses
    point to, of num_weights numbers or bytes.
    """

    def __init__(
        self,
        struct: layout.Tower,
        layers: Sequence[layout.Layer],
        is_causal: bool,
        num_weights: int,
        kept: object,
    ) -> None:
        self._tower, self.layers, self._kept = struct, layers, kept
        self._is_causal, self._is_shared = is_causal, num_weights >= LARGE
        own = library()
        self._run, self._run_states = own.twotower_pass, own.twotower_states
        self._move = own.twotower_move

    def __call__(
        self, rows: Sequence[Row], kv_dtype: torch.dtype, modulations: int | None = None
    ) -> None:
        """One pass over rows of tokens; fills each one's hidden (L, D), normed, and outputs.

        kv_dtype: of the keys and values of all rows. modulations: the address of those of each
        layer's shift, scale and gate (3, D).
        """
        array = (Row * len(rows))(*rows)
        if self._run(
            ctypes.byref(self._tower), len(rows), array, self._is_causal,
            layout.DTYPES.index(kv_dtype), self._threads(), modulations,
        ):  # fmt: skip
            raise IndexError("token ids leave the vocabulary")

    def fill_states(self, count: int, past: int, outputs: int) -> None:
        """The Mamba states after the first `count` of the tokens whose inputs a pass has left."""
        self._run_states(ctypes.byref(self._tower), count, self._threads(), past, outputs)

    def move_keys(
        self, path: Sequence[int], num_past: int, past: int, kv_dtype: torch.dtype
    ) -> None:
        """Of a row's tokens behind num_past, those at the indices of a path come first."""
        indices = (ctypes.c_int32 * len(path))(*path)
        size = kv_dtype.itemsize
        self._move(ctypes.byref(self._tower), past, size, num_past, indices, len(path))

    def _threads(self) -> int:
        return torch.get_num_threads() if self._is_shared else 1


class NativeLinear:
    """x (..., K) -> (..., N) float32 by a weight (N, K); kept: what its addresses point to."""

    def __init__(self, weight: Weight, shape: Sequence[int], kept: object) -> None:
        self._weight, self._kept = weight, kept
        self._rows, self._width = shape
        self._is_shared = self._rows * self._width >= LARGE
        self._run = library().twotower_linear

    def __call__(self, x: Tensor) -> Tensor:
        """x float32."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._rows)
        self.run(self._run, x.data_ptr(), x.numel() // self._width, y.data_ptr())
        return y

    def best(self, x: Tensor, unused_ids: Sequence[int]) -> Tensor:
        """The row (...) with the largest product, none of some ids; -1 where one is not finite."""
        x, count = x.contiguous(), len(unused_ids)
        ids = x.new_empty(x.shape[:-1], dtype=torch.int64)
        unused = (ctypes.c_int64 * count)(*unused_ids)
        length = x.numel() // self._width
        self.run(library().twotower_best, x.data_ptr(), length, unused, count, ids.data_ptr())
        return ids

    def run(self, function: Callable[..., object], *arguments: object) -> None:
        """A function of the library that begins with a weight."""
        threads = torch.get_num_threads() if self._is_shared else 1
        function(ctypes.byref(self._weight), self._rows, self._width, threads, *arguments)
