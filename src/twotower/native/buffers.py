"""States of the context as raw addresses: where a native pass reads them and leaves new ones.

Small models wait for Python as well, so a pass makes few tensors and does sums instead of views.
"""

import math
import operator
import sys
import threading
import weakref
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
_ATTENTION, _MAMBA = AttentionSpec.symbol, MambaSpec.symbol
# Bytes from which memory is kept: the system takes back what is larger, and gives it out again page
# by page. 8 MB of states a step cost 2,048 page faults, at 160M half as much as the step itself.
_MIN_KEPT = 2**18
_MAX_FREE = 6  # buffers that nobody uses: passes of one and of 16 tokens take turns


class Addresses:
    """A struct of addresses for each layer, of each row: table (rows, layers, fields) int64."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self._first, self._step = table.ctypes.data, table.strides[0]

    def of(self, row: int) -> int:
        """Where those of a row begin, valid as long as this lives."""
        return self._first + row * self._step


class PastStates(Addresses):
    """Where the states of B rows are, a `Past` per layer, and what they point into.

    layers: KV with leading (B, S), Mamba with (B,) or (B, 1), on the CPU, float32. They are not
    kept alive: who remembers addresses must not hold on to memory that a cache gave up.
    """

    def __init__(self, layers: Sequence[LayerState], num_rows: int) -> None:
        # The addresses stay valid as long as this and the layers live.
        self._parts = [weakref.ref(part) for part in _parts(layers)]
        self._copies = list[Tensor]()
        table = np.zeros((2, len(layers), len(PAST)), np.int64)
        for layer, state in enumerate(layers):
            if isinstance(state, KV):
                table[:, layer, 0], table[:, layer, 1] = map(self._begin, state)
            elif isinstance(state, MambaState):
                conv = state.conv.mT if state.conv.dim() == 3 else state.conv.squeeze(1).mT
                table[:, layer, 2], table[:, layer, 3] = self._begin(conv), self._begin(state.ssm)
        begins, steps = table
        super().__init__(begins + np.arange(num_rows)[:, None, None] * steps)

    def is_of(self, layers: Sequence[LayerState], num_rows: int) -> bool:
        """Whether these are the same states still."""
        own = [part() for part in self._parts]
        return num_rows == len(self.table) and all(map(operator.is_, _parts(layers), own))

    def _begin(self, value: Tensor) -> tuple[int, int]:
        """Where value (B, ...) begins, and bytes from row to row; of a copy if a row is not in one
        piece.
        """
        if not value[:1].is_contiguous():
            value = value.contiguous()
            self._copies.append(value)
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
        self._keeps_inputs, self._pool, self._num_layers = keeps_inputs, pool, len(layers)
        kinds = [chr(layer.kind) for layer in layers]
        self._attention, self._mambas = (
            [i for i, own in enumerate(kinds) if own == kind] for kind in (_ATTENTION, _MAMBA)
        )
        # Layers of a kind have equal sizes.
        sizes = {chr(layer.kind): layer for layer in layers}
        attention, mamba = (sizes.get(kind, Layer()) for kind in (_ATTENTION, _MAMBA))
        self._token_bytes = _FLOAT * attention.kv_heads * attention.head_dim
        (num_rows, length), make = shape, pool.take if is_whole else torch.zeros
        self._leading = len(self._mambas), num_rows
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

    def addresses(self, pasts: PastStates, lengths: Sequence[int]) -> Addresses:
        """Where a pass finds an `Outputs` for each layer of each row, while this lives. Keys and
        values belong behind the past ones, of which each row has so many.
        """
        num_rows = len(lengths)
        table = np.zeros((num_rows, self._num_layers, len(OUTPUTS)), np.int64)
        behind = self._token_bytes * np.array(lengths, np.int64)
        table[:, self._attention, :2] = pasts.table[:, self._attention, :2] + behind[:, None, None]
        for name in self._parts:
            table[:, self._mambas, OUTPUTS.index(name)] = self._places(name)
        return Addresses(table)

    def _places(self, name: str) -> np.ndarray:
        """Where a part is of each row and Mamba layer, (rows, layers)."""
        begin, per_row, per_layer = _place(self._parts[name])
        layers, rows = map(np.arange, self._leading)
        return begin + rows[:, None] * per_row + layers * per_layer

    def keep(self, layers: Sequence[LayerState], row: int) -> None:
        """A row without tokens: its state stays as it was."""
        mambas = [state for state in layers if isinstance(state, MambaState)]
        for index, state in enumerate(mambas):
            if self._keeps_inputs:
                self._parts["window"][index, row, : self._kept] = state.conv[row].mT
            else:
                self._parts["conv"][index, row] = state.conv[row].mT
                self._parts["ssm"][index, row] = state.ssm[row]

    @property
    def has_mambas(self) -> bool:
        """Whether any layer has a state that depends on how many tokens stay."""
        return bool(self._mambas)

    def make_ssm(self) -> None:
        """Room for the Mamba states after the pass."""
        m = self._mamba
        self._parts["ssm"] = self._pool.take(*self._leading, m.heads, m.head_size, m.state)

    def add_ssm(self, addresses: Addresses) -> None:
        """Room for the Mamba states that are made after the pass, and where it is."""
        self.make_ssm()
        addresses.table[:, self._mambas, OUTPUTS.index("ssm")] = self._places("ssm")

    def states(self) -> list[MambaState]:
        """Each Mamba layer's state after the pass."""
        return self._mamba_states(self._parts["conv"])

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


def _parts(layers: Sequence[LayerState]) -> list[Tensor]:
    return [part for state in layers if state is not None for part in state]


def _place(value: Tensor) -> tuple[int, int, int]:
    """Where value (layers, B, ...) begins, and bytes from row to row and from layer to layer; value
    is contiguous.
    """
    per_row = _FLOAT * math.prod(value.shape[2:])
    return value.data_ptr(), per_row, per_row * value.shape[1]
