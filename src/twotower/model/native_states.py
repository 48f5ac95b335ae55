"""States of the context at raw addresses: where a native pass reads them, where it leaves new ones.

Small models wait for Python as well, so a pass makes few tensors and does sums instead of views.
"""

import math
import sys
import threading
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.config import AttentionSpec, MambaSpec, TowerConfig
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.state import LayerState

_FLOAT = 4  # bytes
# Bytes from which memory is kept: the system takes back what is larger, and gives it out again page
# by page. 8 MB of states a step cost 2,048 page faults, at 160M half as much as the step itself.
_LEAST_KEPT = 2**18
_MOST_FREE = 6  # pieces of memory that nobody uses: passes of one and of 16 tokens take turns


class Past:
    """Addresses of one row's state, for each layer k, v, conv and ssm; and what they point into.

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


class Rooms:
    """Memory for new states, used again as soon as no tensor looks at it any more."""

    def __init__(self) -> None:
        self._buffers: list[bytearray] = []
        self._lock = threading.Lock()  # two queues may read rows at the same time

    def take(self, *shape: int) -> Tensor:
        """A tensor of any values, float32."""
        num_bytes = _FLOAT * math.prod(shape)
        if num_bytes < _LEAST_KEPT or num_bytes == 0:
            return torch.empty(shape)
        with self._lock:
            return torch.frombuffer(self._find(num_bytes), dtype=torch.float32).view(shape)

    def _find(self, num_bytes: int) -> bytearray:
        own = self._buffers
        # A tensor counts as one who knows the buffer; the list and the question are two.
        free = [i for i in range(len(own)) if sys.getrefcount(own[i]) <= 2]
        for i in free:
            if len(own[i]) == num_bytes:
                return own[i]
        for i in reversed(free[:-_MOST_FREE]):  # the oldest
            del own[i]
        own.append(bytearray(num_bytes))
        return own[-1]


class Found:
    """Room for what a context pass of B rows and L tokens leaves behind, and the states made of it.

    keeps_inputs: of a Mamba layer the inputs of all tokens, not the state after them. is_whole:
    all rows commit all tokens; else the rest is zeros, which a mask may hide and NaN would not.
    """

    def __init__(
        self,
        config: TowerConfig,
        shape: tuple[int, int],
        keeps_inputs: bool,
        is_whole: bool,
        rooms: Rooms,
    ) -> None:
        self._layers, (num_rows, length), self._keeps_inputs = config.layers, shape, keeps_inputs
        make = rooms.take if is_whole else torch.zeros
        attention = config.layers_of(AttentionSpec)  # all alike, and so are the Mamba layers
        heads = (attention[0].num_kv_heads, attention[0].head_dim) if attention else (0, 0)
        self._kv = make(2 * len(attention), num_rows, length, *heads)
        mamba = config.layers_of(MambaSpec)
        mambas, channels = (len(mamba), num_rows), mamba[0].conv_channels if mamba else 0
        self._taps = mamba[0].conv_width - 1 if mamba else 0
        self._state = (
            (mamba[0].num_heads, mamba[0].head_dim, mamba[0].state_size) if mamba else (0, 0, 0)
        )
        self._window = make(*mambas, self._taps + length, channels)
        self._rooms, self._ssm = rooms, torch.empty(0)
        if keeps_inputs:
            self._mixed = make(*mambas, length, channels)
            self._step = make(*mambas, length, self._state[0])
        else:
            self.make_room()

    def address(self, row: int) -> int:
        """Where the pass of one row finds k, v, window, mixed, step and ssm of each layer."""
        kv, kv_step = _place(self._kv, row)
        window, window_step = _place(self._window, row)
        mixed = step = ssm = mixed_step = step_step = ssm_step = 0
        if self._keeps_inputs:
            mixed, mixed_step = _place(self._mixed, row)
            step, step_step = _place(self._step, row)
        if len(self._ssm):
            ssm, ssm_step = _place(self._ssm, row)
        found: list[int] = []
        for layer in self._layers:
            if isinstance(layer, AttentionSpec):
                found += (kv, kv + kv_step, 0, 0, 0, 0)
                kv += 2 * kv_step
            elif isinstance(layer, MambaSpec):
                found += (0, 0, window, mixed, step, ssm)
                window, mixed = window + window_step, mixed + mixed_step
                step, ssm = step + step_step, ssm + ssm_step
            else:
                found += (0, 0, 0, 0, 0, 0)
        self._addresses = array("q", found)  # of this row; the one before has been read
        return self._addresses.buffer_info()[0]

    def keep(self, layers: Sequence[LayerState], row: int) -> None:
        """A row without tokens: its state stays as it was."""
        mambas = [state for state in layers if isinstance(state, MambaState)]
        for index, state in enumerate(mambas):
            self._window[index, row, : self._taps] = state.conv[row].mT
            if not self._keeps_inputs:
                self._ssm[index, row] = state.ssm[row]

    def make_room(self) -> None:
        """Room for the Mamba states of a pass that has left their inputs."""
        self._ssm = self._rooms.take(*self._window.shape[:2], *self._state)

    def states(self, counts: Sequence[int]) -> list[LayerState]:
        """Each layer's new state after counts[b] tokens of each row b; None for a Mamba layer of
        which only the inputs are known.
        """
        keys = iter(self._kv.unbind(0))
        found = [] if self._keeps_inputs else self.mamba_states(counts)
        mambas = (MambaState(*(part.unsqueeze(1) for part in state)) for state in found)
        states: list[LayerState] = []
        for layer in self._layers:
            if isinstance(layer, AttentionSpec):
                states.append(KV(next(keys), next(keys)))
            else:
                states.append(next(mambas, None) if isinstance(layer, MambaSpec) else None)
        return states

    def mamba_states(self, counts: Sequence[int]) -> list[MambaState]:
        """Each Mamba layer's state after counts[b] tokens of each row b; needs room for it."""
        window, kept = self._window, self._taps
        if min(counts) == max(counts):
            conv = window[:, :, counts[0] : counts[0] + kept]
        else:
            conv = torch.stack([window[:, b, n : n + kept] for b, n in enumerate(counts)], dim=1)
        convs, states = conv.mT.unbind(0), self._ssm.unbind(0)
        return [MambaState(*parts) for parts in zip(convs, states, strict=True)]


def _place(value: Tensor, row: int) -> tuple[int, int]:
    """Where value[0, row] begins, and bytes from there to value[1, row]; value is contiguous."""
    per_row = _FLOAT * math.prod(value.shape[2:])
    return value.data_ptr() + row * per_row, per_row * value.shape[1]
