"""States of the context as raw addresses: where a native pass reads them and leaves new ones.

Small models wait for Python as well, so a pass makes few tensors and does sums instead of views.
"""

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.state import LayerState
from twotower.native.layout import OUTPUTS, PAST, Layer
from twotower.specs import AttentionSpec, MambaSpec

_FLOAT = 4  # bytes
# Addresses are written as plain numbers, in this order.
assert PAST == ("k", "v", "conv", "ssm") and OUTPUTS[:2] == ("k", "v")
_NO_KEYS, _NO_STATE = (0,) * 2, (0,) * len(OUTPUTS[2:])
_ATTENTION, _MAMBA = AttentionSpec.symbol, MambaSpec.symbol
# Bytes from which memory is kept: the system takes back what is larger, and gives it out again page
# by page. 8 MB of states a step cost 2,048 page faults, at 160M half as much as the step itself.
_MIN_KEPT = 2**18
_MAX_FREE = 6  # buffers that nobody uses: passes of one and of 16 tokens take turns


class Addresses:
    """A struct of addresses for each layer, of each row: rows follow each other at equal steps."""

    def __init__(self, begins: Sequence[int], steps: Sequence[int], num_rows: int) -> None:
        rows = np.arange(num_rows, dtype=np.int64)[:, None]
        self._table = np.array(begins, np.int64) + rows * np.array(steps, np.int64)
        self._first, self._step = self._table.ctypes.data, self._table.strides[0]

    def of(self, row: int) -> int:
        """Where those of a row begin, valid as long as this lives."""
        return self._first + row * self._step


class PastStates(Addresses):
    """Where the states of B rows are, a `Past` per layer, and what they point into.

    layers: KV with leading (B, S), Mamba with (B,) or (B, 1), on the CPU, float32.
    """

    def __init__(self, layers: Sequence[LayerState], num_rows: int) -> None:
        # The addresses stay valid as long as this lives.
        self._kept: list[object] = [layers]
        found: list[tuple[int, int]] = []
        for state in layers:
            parts: list[Tensor | None] = [None] * len(PAST)
            if isinstance(state, KV):
                parts[:2] = state
            elif isinstance(state, MambaState):
                conv = state.conv.mT if state.conv.dim() == 3 else state.conv.squeeze(1).mT
                parts[2:] = conv, state.ssm
            found += map(self._begin, parts)
        begins, steps = zip(*found, strict=True)
        super().__init__(begins, steps, num_rows)

    def _begin(self, value: Tensor | None) -> tuple[int, int]:
        """Where value (B, ...) begins, and bytes from row to row; of a copy if a row is not in one
        piece.
        """
        if value is None:
            return 0, 0
        steps, size = value.stride(), 1
        for step, count in zip(steps[:0:-1], value.shape[:0:-1], strict=True):
            if step != size and count != 1:
                value = value.contiguous()
                self._kept.append(value)
                break
            size *= count
        return value.data_ptr(), _FLOAT * value.stride(0)


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


class PassOutputs:
    """Room for what a context pass of B rows and L tokens leaves, and the states made of it.

    keeps_inputs: of a Mamba layer the inputs of all tokens, not the state after them. is_whole:
    all rows commit all tokens; else the rest is zeros, which a mask may hide and NaN would not.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        shape: tuple[int, int],
        keeps_inputs: bool,
        is_whole: bool,
        pool: BufferPool,
    ) -> None:
        self._kinds = [chr(layer.kind) for layer in layers]
        self._keeps_inputs, self._pool = keeps_inputs, pool
        # Layers of a kind have equal sizes.
        sizes = {chr(layer.kind): layer for layer in layers}
        attention, mamba = (sizes.get(kind, Layer()) for kind in (_ATTENTION, _MAMBA))
        (num_rows, length), make = shape, pool.take if is_whole else torch.zeros
        self._num_rows = num_rows
        keys = 2 * self._kinds.count(_ATTENTION), num_rows, length
        self._kv = make(*keys, attention.kv_heads, attention.head_dim)
        self._leading = self._kinds.count(_MAMBA), num_rows
        self._kept, self._mamba = max(mamba.taps - 1, 0), mamba
        self._parts: dict[str, Tensor] = {}
        if keeps_inputs:
            window = make(*self._leading, self._kept + length, mamba.channels)
            mixed = make(*self._leading, length, mamba.channels)
            step = make(*self._leading, length, mamba.heads)
            self._parts = {"window": window, "mixed": mixed, "step": step}
        else:
            self._parts["conv"] = pool.take(*self._leading, self._kept, mamba.channels)
            self.make_ssm()

    def addresses(self) -> Addresses:
        """Where a pass finds an `Outputs` for each layer of each row, while this lives."""
        own = self._parts
        (kv, kv_row, kv_layer), *parts = (
            _place(value) if value is not None else (0, 0, 0)
            for value in (self._kv, *(own.get(name) for name in OUTPUTS[2:]))
        )
        begins, steps = [begin for begin, _, _ in parts], [row for _, row, _ in parts]
        found: list[int] = []
        found_steps: list[int] = []
        for kind in self._kinds:
            if kind == _ATTENTION:
                found += (kv, kv + kv_layer, *_NO_STATE)
                found_steps += (kv_row, kv_row, *_NO_STATE)
                kv += 2 * kv_layer
            elif kind == _MAMBA:
                found += (*_NO_KEYS, *begins)
                found_steps += (*_NO_KEYS, *steps)
                begins = [begin + step for begin, (_, _, step) in zip(begins, parts, strict=True)]
            else:
                found += (*_NO_KEYS, *_NO_STATE)
                found_steps += (*_NO_KEYS, *_NO_STATE)
        return Addresses(found, found_steps, self._num_rows)

    def keep(self, layers: Sequence[LayerState], row: int) -> None:
        """A row without tokens: its state stays as it was."""
        mambas = [state for state in layers if isinstance(state, MambaState)]
        for index, state in enumerate(mambas):
            if self._keeps_inputs:
                self._parts["window"][index, row, : self._kept] = state.conv[row].mT
            else:
                self._parts["conv"][index, row] = state.conv[row].mT
                self._parts["ssm"][index, row] = state.ssm[row]

    def make_ssm(self) -> None:
        """Room for the Mamba states after the pass."""
        m = self._mamba
        self._parts["ssm"] = self._pool.take(*self._leading, m.heads, m.head_size, m.state)

    def states(self) -> list[LayerState]:
        """Each layer's new state; None for a Mamba layer of which only the inputs are known."""
        keys = iter(self._kv.unbind(0))
        found = [] if self._keeps_inputs else self._mamba_states(self._parts["conv"])
        mambas = (MambaState(*(part.unsqueeze(1) for part in state)) for state in found)
        states: list[LayerState] = []
        for kind in self._kinds:
            if kind == _ATTENTION:
                states.append(KV(next(keys), next(keys)))
            else:
                states.append(next(mambas, None) if kind == _MAMBA else None)
        return states

    def states_after(self, counts: Sequence[int]) -> list[MambaState]:
        """Each Mamba layer's state after counts[b] tokens of each row b, whose ssm is filled."""
        window, kept = self._parts["window"], self._kept
        if min(counts) == max(counts):
            return self._mamba_states(window[:, :, counts[0] : counts[0] + kept])
        rows = [window[:, b, n : n + kept] for b, n in enumerate(counts)]
        return self._mamba_states(torch.stack(rows, dim=1))

    def _mamba_states(self, conv: Tensor) -> list[MambaState]:
        """conv (layers, B, W-1, C)."""
        both = zip(conv.mT.unbind(0), self._parts["ssm"].unbind(0), strict=True)
        return [MambaState(*parts) for parts in both]


def _place(value: Tensor) -> tuple[int, int, int]:
    """Where value (layers, B, ...) begins, and bytes from row to row and from layer to layer; value
    is contiguous.
    """
    per_row = _FLOAT * math.prod(value.shape[2:])
    return value.data_ptr(), per_row, per_row * value.shape[1]
