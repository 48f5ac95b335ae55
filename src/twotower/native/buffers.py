"""States of the context as raw addresses: where a native pass reads them and leaves new ones.

Small models wait for Python as well, so a pass makes few tensors and does sums instead of views.
"""

import math
import sys
import threading
from collections.abc import Callable, Sequence
from ctypes import addressof, c_char

import numpy as np
import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.view import LayerState, Version
from twotower.native.layout import DTYPES, OUTPUTS, PAST, Layer
from twotower.specs import AttentionSpec, MambaSpec

_FLOAT = 4  # bytes
# Addresses are written as plain numbers, in this order.
assert PAST == ("k", "v", "conv", "ssm")
assert OUTPUTS == ("k", "v", "conv", "ssm", "window", "mixed", "step")
_KEYS, _CONV, _SSM, _WINDOW = slice(2), 2, 3, 4
# Bytes from which memory is kept: the system takes back what is larger, and gives it out again page
# by page. 8 MB of states a step cost 2,048 page faults, at 160M half as much as the step itself.
_MIN_KEPT = 2**18
_MAX_FREE = 6  # buffers that nobody uses: passes of one and of 16 tokens take turns


class Addresses:
    """A struct of addresses for each layer, of each row: table (rows, layers, fields) int64. kept:
    what of it they alone keep alive. kv_dtype: of the keys and values among it.
    """

    def __init__(
        self, table: np.ndarray, kept: object = None, kv_dtype: torch.dtype = torch.float32
    ) -> None:
        self.table, self.kept, self.kv_dtype = table, kept, kv_dtype
        # numpy's own way to its address takes longer than the sums.
        self._first, self._step = addressof(c_char.from_buffer(table.data)), table.strides[0]

    def of(self, row: int) -> int:
        """Where those of a row begin, valid as long as this lives."""
        return self._first + row * self._step


def past_states(layers: Sequence[LayerState], num_rows: int) -> Addresses:
    """Where the states of rows are, a `Past` per layer, valid as long as the layers live too.

    layers: KV with leading (B, S) in one of `DTYPES`, Mamba with (B,) or (B, 1) in float32, on the
    CPU. TypeError for others: a pass would write beyond them.
    """
    copies: list[Tensor] = []
    kv_dtype = next((s.k.dtype for s in layers if isinstance(s, KV)), torch.float32)

    def begin(value: Tensor, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
        # Where value (B, ...) begins, and bytes from row to row; of a copy if a row is not in one
        # piece.
        if value.dtype != dtype or dtype not in DTYPES:
            raise TypeError(f"native passes keep such a state in {dtype}, and it is {value.dtype}")
        if not (value.is_contiguous() or value[:1].is_contiguous()):
            value = value.contiguous()
            copies.append(value)
        return value.data_ptr(), dtype.itemsize * value.stride(0)

    addresses: list[int] = []  # of each layer, where its fields begin, then bytes from row to row
    for state in layers:
        if isinstance(state, KV):
            (k, k_step), (v, v_step) = (begin(part, kv_dtype) for part in state)
            addresses += k, v, 0, 0, k_step, v_step, 0, 0
        elif isinstance(state, MambaState):
            (conv, conv_step), (ssm, ssm_step) = begin(state.conv.mT), begin(state.ssm)
            addresses += 0, 0, conv, ssm, 0, 0, conv_step, ssm_step
        else:
            addresses += [0] * 8
    table = np.array(addresses, np.int64).reshape(len(layers), 2, len(PAST))
    return Addresses(
        table[:, 0] + np.arange(num_rows)[:, None, None] * table[:, 1], copies, kv_dtype
    )


def known_states(version: Version | None) -> Addresses | None:
    """Where the states of a cache of this version are, if a pass has said so."""
    known = None if version is None else version.addresses
    return known if isinstance(known, Addresses) else None


class BufferPool:
    """Memory for new states, used again as soon as no tensor looks at it any more."""

    def __init__(self) -> None:
        self._buffers: list[bytearray] = []
        self._lock = threading.Lock()  # two threads may run passes at the same time

    def take(self, *shape: int) -> Tensor:
        """A tensor of any values, float32."""
        num_bytes = _FLOAT * math.prod(shape)
        if num_bytes < _MIN_KEPT or num_bytes == 0:
            return torch.empty(shape)
        with self._lock:
            return torch.frombuffer(self._find(num_bytes), dtype=torch.float32).view(shape)

    def _find(self, num_bytes: int) -> bytearray:
        own = self._buffers
        # A tensor counts as one reference to the buffer; the list and the question are two.
        free = [i for i in range(len(own)) if sys.getrefcount(own[i]) <= 2]
        for i in free:
            if len(own[i]) == num_bytes:
                return own[i]
        for i in reversed(free[:-_MAX_FREE]):  # the oldest
            del own[i]
        own.append(bytearray(num_bytes))
        return own[-1]


class StateSizes:
    """What the layers of a tower keep of a text; layers of a kind have equal sizes."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        own = {chr(layer.kind): layer for layer in layers}
        attention, mamba = (own.get(spec.symbol, Layer()) for spec in (AttentionSpec, MambaSpec))
        kinds = np.array([layer.kind for layer in layers], np.int64)[:, None]  # (layers, 1)
        self.is_mamba = kinds == ord(MambaSpec.symbol)
        self._mamba_index = self.is_mamba.cumsum(0) - 1
        self._row_indices: dict[int, np.ndarray] = {}
        self.num_mambas = int(self.is_mamba.sum())
        width = attention.kv_heads * attention.head_dim
        self.token_numbers = width * (kinds == ord(AttentionSpec.symbol))
        """A token's keys, or its values; 0 for a layer without."""
        self.kept, self.channels = max(mamba.taps - 1, 0), mamba.channels
        self.ssm = mamba.heads, mamba.head_size, mamba.state

    def row_index(self, num_rows: int) -> np.ndarray:
        """Of each row of each Mamba layer among all of those, (B, layers, 1)."""
        if num_rows not in self._row_indices:
            rows = np.arange(num_rows)[:, None, None]
            self._row_indices[num_rows] = self._mamba_index * num_rows + rows
        return self._row_indices[num_rows]


class PassOutputs(Addresses):
    """Room for what a context pass over L tokens leaves, an `Outputs` per layer of each row, and
    the states made of it.

    pasts: of the rows, of which each has so many tokens (lengths); keys and values belong behind
    those. keeps_inputs: of a Mamba layer the inputs of all tokens, not the state after them.
    is_whole: all rows commit all tokens; else the rest is zeros, which a mask may hide and NaN
    would not.
    """

    def __init__(
        self,
        sizes: StateSizes,
        pasts: Addresses,
        lengths: Sequence[int],
        num_tokens: int,
        keeps_inputs: bool,
        is_whole: bool,
        pool: BufferPool,
    ) -> None:
        self._keeps_inputs, self._sizes, self._pasts = keeps_inputs, sizes, pasts
        parts: tuple[Tensor | None, ...] = ()
        num_rows = len(lengths)
        table = np.zeros((num_rows, len(sizes.is_mamba), len(OUTPUTS)), np.int64)
        if sizes.num_mambas:
            parts = self._make_states(
                num_rows, num_tokens, pool.take if is_whole else torch.zeros, pool
            )
            addresses = [(0, 0) if part is None else _address(part) for part in parts]
            begin, step = np.array(addresses, np.int64).T
            table += sizes.is_mamba * (begin + sizes.row_index(num_rows) * step)
        token_bytes = pasts.kv_dtype.itemsize * sizes.token_numbers
        behind = np.array(lengths, np.int64)[:, None, None] * token_bytes
        table[..., _KEYS] = pasts.table[..., _KEYS] + behind
        if keeps_inputs:  # states are made when it is known how many tokens stay
            self.after = Addresses(table.copy())
            table[..., _SSM] = 0
        super().__init__(table, parts, pasts.kv_dtype)

    def _make_states(
        self, num_rows: int, num_tokens: int, make: Callable[..., Tensor], pool: BufferPool
    ) -> tuple[Tensor | None, ...]:
        """Room for the Mamba layers, in the order of `Outputs`; `make` for what tokens fill."""
        sizes, leading = self._sizes, (self._sizes.num_mambas, num_rows)
        self._ssm = pool.take(*leading, *sizes.ssm)
        if not self._keeps_inputs:
            self._conv = pool.take(*leading, sizes.kept, sizes.channels)
            return None, None, self._conv, self._ssm, None, None, None
        self._conv = make(*leading, sizes.kept + num_tokens, sizes.channels)
        mixed = make(*leading, num_tokens, sizes.channels)
        step = make(*leading, num_tokens, sizes.ssm[0])
        return None, None, None, self._ssm, self._conv, mixed, step

    def keep(self, layers: Sequence[LayerState], row: int) -> None:
        """A row without tokens: its state stays as it was."""
        mambas = [state for state in layers if isinstance(state, MambaState)]
        for index, state in enumerate(mambas):
            self._conv[index, row, : self._sizes.kept] = state.conv[row].mT
            if not self._keeps_inputs:
                self._ssm[index, row] = state.ssm[row]

    def states(self, counts: Sequence[int]) -> tuple[list[MambaState], Addresses]:
        """Each Mamba layer's state after counts[b] tokens of each row b, whose ssm is filled, and
        where the past of the next pass is. Where rows skip other numbers of inputs of convolutions
        their states are copies.
        """
        if not self._sizes.num_mambas:
            return [], self._pasts  # keys have grown where they are
        window, kept = self._conv, self._sizes.kept
        skipped = counts if self._keeps_inputs else [0] * len(counts)
        is_even = min(skipped) == max(skipped)
        table = (self.after if self._keeps_inputs else self).table[..., : len(PAST)].copy()
        table[..., _KEYS] = self._pasts.table[..., _KEYS]
        if self._keeps_inputs:  # nobody reads other layers'
            own = skipped[0] if is_even else np.array(skipped, np.int64)[:, None]
            table[..., _CONV] = self.table[..., _WINDOW] + _FLOAT * self._sizes.channels * own
        if is_even:
            conv = window[:, :, skipped[0] : skipped[0] + kept]
        else:
            conv = torch.stack([window[:, b, n : n + kept] for b, n in enumerate(skipped)], dim=1)
        both = zip(conv.mT.unbind(0), self._ssm.unbind(0), strict=True)  # (B, C, W-1) each
        return [MambaState(*parts) for parts in both], Addresses(table, window, self.kv_dtype)


def _address(value: Tensor) -> tuple[int, int]:
    """Where value (layers, B, ...) begins, and bytes from row to row."""
    return value.data_ptr(), _FLOAT * value.stride(1)
