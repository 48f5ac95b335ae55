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
assert PAST == ("k", "v", "conv", "ssm")
assert OUTPUTS == ("k", "v", "conv", "ssm", "window", "mixed", "step")
_KEYS, _SSM = slice(2), 3
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
    """Where the states of B rows are, a `Past` per layer, valid as long as this and the layers
    live.

    layers: KV with leading (B, S), Mamba with (B,) or (B, 1), on the CPU, float32.
    """

    def __init__(self, layers: Sequence[LayerState], num_rows: int) -> None:
        self._copies = list[Tensor]()
        places = list[int]()  # of each layer, where its fields begin, then bytes from row to row
        for state in layers:
            if isinstance(state, KV):
                (k, k_step), (v, v_step) = map(self._begin, state)
                places += k, v, 0, 0, k_step, v_step, 0, 0
            elif isinstance(state, MambaState):
                (conv, conv_step), (ssm, ssm_step) = (
                    self._begin(state.conv.mT),
                    self._begin(state.ssm),
                )
                places += 0, 0, conv, ssm, 0, 0, conv_step, ssm_step
            else:
                places += [0] * 8
        table = np.array(places, np.int64).reshape(len(layers), 2, len(PAST))
        super().__init__(table[:, 0] + np.arange(num_rows)[:, None, None] * table[:, 1])

    def _begin(self, value: Tensor) -> tuple[int, int]:
        """Where value (B, ...) begins, and bytes from row to row; of a copy if a row is not in one
        piece.
        """
        if not (value.is_contiguous() or value[:1].is_contiguous()):
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


class StateSizes:
    """What the layers of a tower keep of a text; layers of a kind have equal sizes."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        own = {chr(layer.kind): layer for layer in layers}
        attention, mamba = (own.get(spec.symbol, Layer()) for spec in (AttentionSpec, MambaSpec))
        kinds = np.array([layer.kind for layer in layers], np.int64)[:, None]  # (layers, 1)
        self.is_mamba = kinds == ord(MambaSpec.symbol)
        self.mamba_index = self.is_mamba.cumsum(0) - 1
        """Of each Mamba layer among those."""
        self.num_mambas = int(self.is_mamba.sum())
        width = _FLOAT * attention.kv_heads * attention.head_dim
        self.token_bytes = width * (kinds == ord(AttentionSpec.symbol))
        """Of a token's keys, and of its values; 0 for a layer without."""
        self.kept, self.channels = max(mamba.taps - 1, 0), mamba.channels
        self.ssm = mamba.heads, mamba.head_size, mamba.state


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
        pasts: PastStates,
        lengths: Sequence[int],
        num_tokens: int,
        keeps_inputs: bool,
        is_whole: bool,
        pool: BufferPool,
    ) -> None:
        self._keeps_inputs, self._kept = keeps_inputs, sizes.kept
        leading, channels = (sizes.num_mambas, len(lengths)), sizes.channels
        self._ssm = pool.take(*leading, *sizes.ssm)
        parts: tuple[Tensor | None, ...]
        if keeps_inputs:
            make = pool.take if is_whole else torch.zeros
            self._conv = make(*leading, sizes.kept + num_tokens, channels)
            mixed = make(*leading, num_tokens, channels)
            step = make(*leading, num_tokens, sizes.ssm[0])
            self._inputs = mixed, step
            parts = None, None, None, self._ssm, self._conv, mixed, step
        else:
            self._conv = pool.take(*leading, sizes.kept, channels)
            parts = None, None, self._conv, self._ssm, None, None, None
        places = [(0, 0, 0) if part is None else _place(part) for part in parts]
        begin, per_layer, per_row = np.array(places, np.int64).T
        of_row = sizes.is_mamba * (begin + sizes.mamba_index * per_layer)
        rows = np.arange(len(lengths))[:, None, None]
        table = of_row + rows * (sizes.is_mamba * per_row)
        behind = np.array(lengths, np.int64)[:, None, None] * sizes.token_bytes
        table[..., _KEYS] = pasts.table[..., _KEYS] + behind
        if keeps_inputs:  # states are made when it is known how many tokens stay
            self.after = Addresses(table.copy())
            table[..., _SSM] = 0
        super().__init__(table)

    def keep(self, layers: Sequence[LayerState], row: int) -> None:
        """A row without tokens: its state stays as it was."""
        mambas = [state for state in layers if isinstance(state, MambaState)]
        for index, state in enumerate(mambas):
            self._conv[index, row, : self._kept] = state.conv[row].mT
            if not self._keeps_inputs:
                self._ssm[index, row] = state.ssm[row]

    def states(self) -> list[MambaState]:
        """Each Mamba layer's state after the pass."""
        return self._mamba_states(self._conv)

    def states_after(self, counts: Sequence[int]) -> list[MambaState]:
        """Each Mamba layer's state after counts[b] tokens of each row b, whose ssm is filled."""
        window, kept = self._conv, self._kept
        if min(counts) == max(counts):
            return self._mamba_states(window[:, :, counts[0] : counts[0] + kept])
        rows = [window[:, b, n : n + kept] for b, n in enumerate(counts)]
        return self._mamba_states(torch.stack(rows, dim=1))

    def _mamba_states(self, conv: Tensor) -> list[MambaState]:
        """conv (layers, B, W-1, C)."""
        both = zip(conv.mT.unbind(0), self._ssm.unbind(0), strict=True)
        return [MambaState(*parts) for parts in both]


def _place(value: Tensor) -> tuple[int, int, int]:
    """Where value (layers, B, ...) begins, and bytes from layer to layer and from row to row."""
    return value.data_ptr(), _FLOAT * value.stride(0), _FLOAT * value.stride(1)
