"""States of the context as raw addresses: where a native pass reads them and leaves new ones.

Small models wait for Python as well, so a pass makes few tensors and does sums instead of views.
"""

import math
import sys
import threading
from array import array
from collections.abc import Sequence

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
_LEAST_KEPT = 2**18
_MOST_FREE = 6  # buffers that nobody uses: passes of one and of 16 tokens take turns


class PastStates:
    """Addresses of one row's state, a `Past` per layer; and what they point into.

    layers: KV with leading (B, S), Mamba with (B,) or (B, 1), on the CPU, float32.
    """

    def __init__(self, layers: Sequence[LayerState], row: int) -> None:
        self._kept: list[object] = [layers]  # the addresses stay valid as long as this lives
        found: list[int] = []
        for state in layers:
            if isinstance(state, KV):
                k, v = state
                found += (self._begin(k, row), self._begin(v, row), 0, 0)
            elif isinstance(state, MambaState):
                conv = state.conv.mT if state.conv.dim() == 3 else state.conv.squeeze(1).mT
                found += (0, 0, self._begin(conv, row), self._begin(state.ssm, row))
            else:
                found += (0, 0, 0, 0)
        self._addresses = array("q", found)
        self.address = self._addresses.buffer_info()[0]

    def _begin(self, value: Tensor, row: int) -> int:
        """Where row `row` of value (B, ...) begins; of a copy if the row is not in one piece."""
        steps, size = value.stride(), 1
        for step, count in zip(steps[:0:-1], value.shape[:0:-1], strict=True):
            if step != size and count != 1:
                value, row = value[row : row + 1].contiguous(), 0
                self._kept.append(value)
                break
            size *= count
        return value.data_ptr() + _FLOAT * row * steps[0] if row else value.data_ptr()


class BufferPool:
    """Memory for new states, used again as soon as no tensor looks at it any more."""

    def __init__(self) -> None:
        self._buffers: list[bytearray] = []
        self._lock = threading.Lock()  # two threads may run passes at the same time

    def take(self, *shape: int) -> Tensor:
        """A tensor of any values, float32."""
        num_bytes = _FLOAT * math.prod(shape)
        if num_bytes < _LEAST_KEPT or num_bytes == 0:
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
        for i in reversed(free[:-_MOST_FREE]):  # the oldest
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
        keys = 2 * self._kinds.count(_ATTENTION), num_rows, length
        self._kv = make(*keys, attention.kv_heads, attention.head_dim)
        self._leading = self._kinds.count(_MAMBA), num_rows
        self._kept, self._mamba = max(mamba.taps - 1, 0), mamba
        self._parts: dict[str, Tensor] = {}
        self._addresses: list[array[int]] = []  # they stay valid as long as this lives
        if keeps_inputs:
            window = make(*self._leading, self._kept + length, mamba.channels)
            mixed = make(*self._leading, length, mamba.channels)
            step = make(*self._leading, length, mamba.heads)
            self._parts = {"window": window, "mixed": mixed, "step": step}
        else:
            self._parts["conv"] = pool.take(*self._leading, self._kept, mamba.channels)
            self.make_ssm()

    def address(self, row: int) -> int:
        """Where the pass of one row finds an `Outputs` for each layer."""
        kv, kv_step = _place(self._kv, row)
        own = self._parts
        places = [_place(own[name], row) if name in own else (0, 0) for name in OUTPUTS[2:]]
        states, steps = [begin for begin, _ in places], [step for _, step in places]
        found: list[int] = []
        for kind in self._kinds:
            if kind == _ATTENTION:
                found += (kv, kv + kv_step, 0, 0, 0, 0, 0)
                kv += 2 * kv_step
            elif kind == _MAMBA:
                found += (0, 0, *states)
                states = [begin + step for begin, step in zip(states, steps, strict=True)]
            else:
                found += (0, 0, 0, 0, 0, 0, 0)
        addresses = array("q", found)
        self._addresses.append(addresses)
        return addresses.buffer_info()[0]

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


def _place(value: Tensor, row: int) -> tuple[int, int]:
    """Where value[0, row] begins, and bytes from there to value[1, row]; value is contiguous."""
    per_row = _FLOAT * math.prod(value.shape[2:])
    return value.data_ptr() + row * per_row, per_row * value.shape[1]
