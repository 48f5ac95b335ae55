"""Memory at fixed addresses: what passes of fixed shapes read and write, call after call.

An arena mirrors the cache of one batch at a time. What it holds already is not copied again.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from twotower.graphs.choosing import Choosing
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.delta import CacheDelta
from twotower.model.state import ContextCache
from twotower.model.view import LayerState, map_states

LEAST_PAST = 256  # tokens that a mirror has room for, at least
T = TypeVar("T")


def bucket(count: int) -> int:
    """The next power of two: passes of some sizes serve all."""
    return 1 << (count - 1).bit_length() if count > 0 else 1


class Recording(Generic[T]):
    """A pass as a CUDA graph, and the tensors that hold what it puts out after each replay."""

    def __init__(self, function: Callable[[], T], pool: Any, device: torch.device) -> None:
        """The function reads and writes fixed addresses of the device and never waits for it."""
        self._graph, self._device = torch.cuda.CUDAGraph(), device
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries choose kernels and take memory in first runs
                for _ in range(2):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._outputs = function()

    def __call__(self) -> T:
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._outputs


class Arena:
    """The mirror of a cache of up to B rows, and the other inputs of its passes.

    lengths, counts (B,), t (B,), hidden (B, D); rows that are not used have length 0.
    """

    def __init__(self, empty: ContextCache, hidden: Tensor) -> None:
        """empty: a cache of B rows before the first token; hidden: zeros (B, D) of its kind."""
        self._layers, self.num_rows, self.hidden = empty.layers, empty.num_rows, hidden
        self.lengths = torch.zeros(self.num_rows, dtype=torch.int64, device=hidden.device)
        self.counts = torch.zeros_like(self.lengths)
        self.t = torch.ones(self.num_rows, device=hidden.device)
        self.choosing = Choosing(self.num_rows, hidden.device)
        self.quickest = deque[int](maxlen=8)  # passes of the newest blocks
        self._ids: dict[tuple[str, int], Tensor] = {}
        self._confidence: dict[int, Tensor] = {}
        self._capacity = 0
        self._held: object = None  # the version of a cache
        self.recordings: dict[Hashable, Recording[Any]] = {}
        self.turn = 0  # grows whenever what the mirror holds may change

    def ids(self, kind: str, length: int) -> Tensor:
        """Token ids (B, L) for passes of a kind; what the newest did not set an earlier one did. A
        block's mask may be no token of the context tower.
        """
        if (kind, length) not in self._ids:
            size = self.num_rows, length
            ids = torch.zeros(size, dtype=torch.int64, device=self.lengths.device)
            self._ids[kind, length] = ids
        return self._ids[kind, length]

    def confidence(self, length: int) -> Tensor:
        """Of the newest prediction at each position of blocks (B, T)."""
        if length not in self._confidence:
            self._confidence[length] = self.t.new_ones(self.num_rows, length)
        return self._confidence[length]

    def layers(self, num_past: int) -> tuple[LayerState, ...]:
        """What each layer keeps, with room for so many tokens: `ContextCache.layers`."""
        return map_states(self._layers, lambda part: part[:, :num_past], KV)

    def reserve(self, num_tokens: int) -> int:
        """Make room for so many tokens a row; returns the room of a pass, which may be less than
        all that there is.
        """
        room = max(LEAST_PAST, bucket(num_tokens))
        if room > self._capacity:
            self._capacity = room
            self.recordings.clear()  # they know the old addresses
            self.forget()
            shape = self.num_rows, room
            self._layers = map_states(
                self._layers, lambda part: part.new_zeros(*shape, *part.shape[2:]), KV
            )
        return room

    def load(self, layers: Sequence[LayerState], lengths: Tensor, version: object) -> None:
        """Hold what a cache of a version does: layers as `ContextCache.layers`, lengths (R,).
        What a view of some layers says is nobody's state.
        """
        if version is None or version is not self._held:
            self._copy(layers, len(lengths))
            is_whole = all(
                its is not None for mine, its in zip(self._layers, layers, strict=True) if mine
            )
            self.hold(version if is_whole else None)
        self.lengths.zero_()
        self.lengths[: len(lengths)] = lengths.to(self.lengths.device)

    def hold(self, version: object) -> None:
        """Note whose state this is."""
        self._held = version
        self.turn += 1

    def forget(self) -> None:
        """Note that this is nobody's state."""
        self.hold(None)

    def clear(self) -> None:
        """Have no tokens at all, of nobody."""
        self.forget()
        self.lengths.zero_()
        self.counts.zero_()

    def _copy(self, layers: Sequence[LayerState], num_rows: int) -> None:
        own, theirs = list[Tensor](), list[Tensor]()
        for mine, its in zip(self._layers, layers, strict=True):
            if mine is None or its is None:
                continue
            for to, part in zip(mine, its, strict=True):
                if isinstance(mine, KV):
                    to.zero_()  # NaN of others' tokens would pass any mask: 0 times NaN is NaN
                    to = to[:, : part.shape[1]]
                own.append(to[:num_rows])
                theirs.append(part)
        copy_all(own, theirs)

    def keep(self, states: Sequence[object], length: int) -> None:
        """Write what a pass over L tokens left: keys behind each row's last token, and Mamba states
        with leading (B, 1). Leaves `lengths` alone.
        """
        rows = torch.arange(self.num_rows, device=self.lengths.device).unsqueeze(1)
        positions = self.lengths.unsqueeze(1) + torch.arange(length, device=self.lengths.device)
        for mine, new in zip(self._layers, states, strict=True):
            if isinstance(mine, KV) and isinstance(new, KV):
                for to, part in zip(mine, new, strict=True):
                    to[rows, positions] = part.to(to.dtype)
            elif isinstance(mine, MambaState) and isinstance(new, MambaState):
                for to, part in zip(mine, new, strict=True):
                    to.copy_(part[:, -1])

    def delta_since(self, lengths: Tensor, counts: Tensor) -> CacheDelta:
        """What it holds beyond the first lengths (R,) tokens of its rows, counts (R,) of them;
        both on the CPU.
        """
        num_rows, most = len(lengths), int(counts.max())
        positions = (lengths.unsqueeze(1) + torch.arange(most)).to(self.lengths.device)
        rows = torch.arange(num_rows, device=positions.device).unsqueeze(1)
        mamba = iter(self.mamba(num_rows))
        states: list[LayerState] = []
        for state in self._layers:
            if isinstance(state, KV):
                states.append(KV(*(part[rows, positions] for part in state)))
            elif state is None:
                states.append(None)
            else:
                states.append(MambaState(*(part.unsqueeze(1) for part in next(mamba))))
        return CacheDelta(states, self.hidden[:num_rows].clone(), counts)

    def put_mamba(self, states: Sequence[MambaState]) -> None:
        """Mamba states (R, ...) of the first rows, layer by layer."""
        mine = [state for state in self._layers if isinstance(state, MambaState)]
        own = [to[: len(p)] for to, p in zip(_flat(mine), _flat(states), strict=True)]
        copy_all(own, _flat(states))

    def mamba(self, num_rows: int) -> list[MambaState]:
        """Copies of the Mamba states of the first rows."""
        mine = [state for state in self._layers if isinstance(state, MambaState)]
        parts = copies([part[:num_rows] for part in _flat(mine)])
        return [MambaState(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors."""
    made = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in tensors]
    copy_all(made, tensors)
    return made


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device on the CPU, for which the host waits once."""
    found = [part.to("cpu", non_blocking=True) for part in tensors]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return found


def copy_all(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy tensors in as few launches as there can be."""
    if to:
        torch._foreach_copy_(list(to), list(tensors))


def _flat(states: Sequence[MambaState]) -> list[Tensor]:
    return [part for state in states for part in state]
