"""The context tower's state: the cache that it writes, the only mutable object of the model.

What the denoiser reads of it is in `view`; how rows enter and leave it is in `rows`.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.view import ContextView, LayerState, Version, map_states
from twotower.specs import AttentionSpec, LayerSpec, MambaSpec

# Tokens by which a buffer grows. Doubling would make short texts grow again and again, and leave
# half of a long one's room unused.
_MIN_GROWTH, _MAX_GROWTH = 64, 1024


def empty_states(
    layers: Sequence[LayerSpec],
    num_rows: int,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> list[LayerState]:
    """What each layer keeps of a text before its first token: keys and values in kv_dtype, inputs
    of convolutions in dtype, SSM states in float32.
    """
    states: list[LayerState] = []
    for spec in layers:
        if isinstance(spec, AttentionSpec):
            shape = 2, num_rows, 0, spec.num_kv_heads, spec.head_dim
            states.append(KV(*torch.empty(shape, device=device, dtype=kv_dtype)))
        elif isinstance(spec, MambaSpec):
            inputs = num_rows, spec.conv_channels, spec.conv_width - 1
            ssm = num_rows, spec.num_heads, spec.head_dim, spec.state_size
            conv = torch.zeros(inputs, device=device, dtype=dtype)
            states.append(MambaState(conv, torch.zeros(ssm, device=device)))
        else:
            states.append(None)
    return states


class ForwardOutput(NamedTuple):
    """The context tower's forward pass over L tokens after a cache, which holds their keys and
    values behind its own, of its `version`, until another pass overwrites them.

    hidden (B, L, D), normed. states_after: each Mamba layer's state after the first counts (B,) of
    the tokens. move_keys: let a row's tokens at ascending indices come first (`ContextCache`'s).
    """

    hidden: Tensor
    version: Version
    states_after: Callable[[Tensor], list[MambaState]]
    move_keys: Callable[[int, Sequence[int]], None]


class ContextCache:
    """State of the context tower after `lengths[b]` committed tokens of each row b.

    `layers[i]` is what layer i keeps: KV (B, S, Hk, A), S the longest row, MambaState conv
    (B, C, W-1) and ssm (B, H, P, N), or None; `buffers` the same with room for more rows and
    tokens, so that these come without a copy of the others. `last_hidden` (B, D) is the tower's
    output at each row's last token, None before the first; `outputs` (B, S, D) at all of them, None
    where they are not kept. `version` is another object after each change. `num_rows` is B,
    `num_past` S; `is_uniform`: all rows hold as many tokens, so that no mask is needed.
    """

    def __init__(
        self, states: list[LayerState], num_rows: int, outputs: Tensor | None = None
    ) -> None:
        """states: of each layer, before the first token; outputs (B, 0, D) where all are kept."""
        # On the CPU: it steers control flow.
        self.lengths = torch.zeros(num_rows, dtype=torch.int64)
        self.last_hidden: Tensor | None = None
        self.version = Version()
        self.buffers, self.output_buffer = states, outputs

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row (B,) int64, never changed in place."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        self._lengths, known = lengths, lengths.tolist()
        self.num_rows, self.num_past = len(known), max(known, default=0)
        self.is_uniform = known == [self.num_past] * len(known)

    @property
    def layers(self) -> tuple[LayerState, ...]:
        """What each layer keeps; keys and values without the room behind them, not copied."""
        return self._read(range(len(self.buffers)))

    def _read(self, layers: Collection[int]) -> tuple[LayerState, ...]:
        used = slice(self.num_rows), slice(self.num_past)
        found: list[LayerState] = [None] * len(self.buffers)
        for index in layers:
            state = self.buffers[index]
            found[index] = KV(state.k[used], state.v[used]) if isinstance(state, KV) else state
        return tuple(found)

    @property
    def outputs(self) -> Tensor | None:
        """The tower's output at each token, without the room behind them, not copied."""
        kept = self.output_buffer
        return None if kept is None else kept[: self.num_rows, : self.num_past]

    def make_room(self, num_tokens: int) -> Sequence[LayerState]:
        """The buffers, with room for so many tokens behind each row's, where a pass may write: no
        part of the cache before `commit`. What an earlier pass wrote is given up.
        """
        length = self.num_past + num_tokens
        # The last to grow is the last one: where it has room, all have.
        last = next((s.k.shape for s in reversed(self.buffers) if isinstance(s, KV)), None)
        if last is None or (self.num_rows <= last[0] and length <= last[1]):
            self.version = Version(self.version.addresses)
            return self.buffers
        self.version = Version()
        for index, state in enumerate(self.buffers):
            if isinstance(state, KV):
                grown = (with_room(part, self.num_rows, self.num_past, length) for part in state)
                self.buffers[index] = KV(*grown)
        return self.buffers

    def view(self, reads: Collection[int] | None = None) -> ContextView:
        """A frozen view of the layers `reads`, of all if not given, which no later call changes."""
        own = self.layers if reads is None else self._read(reads)
        layers = map_states(own, lambda part: part.unsqueeze(1), MambaState)
        lengths = None if self.is_uniform else self.lengths
        hidden = None if self.last_hidden is None else self.last_hidden.unsqueeze(1)
        return ContextView(layers, lengths, self.num_past, self.num_rows, hidden, self.version)

    def output_of(
        self,
        hidden: Tensor,
        states: Sequence[object],
        states_after: Callable[[Tensor], list[MambaState]] | None = None,
    ) -> ForwardOutput:
        """Of a pass that leaves keys and values (B, L, ...) of its tokens, which are copied into
        the room, and Mamba states (B, 1, ...) after the last, or states_after.
        """
        self._write_behind(_keys(self.make_room(hidden.shape[1])), _keys(states))
        mambas = [state for state in states if isinstance(state, MambaState)]
        last = [MambaState(state.conv[:, -1], state.ssm[:, -1]) for state in mambas]
        return ForwardOutput(
            hidden, self.version, states_after or (lambda counts: last), self.move_keys
        )

    def move_keys(self, row: int, path: Sequence[int]) -> None:
        """Of a row's tokens in the room those at the indices of a path come first, in its order."""
        start, indices = int(self.lengths[row]), torch.tensor(path)
        for part in _keys(self.buffers):
            behind = part[row, start:]
            behind[: len(path)] = behind[indices.to(part.device)]

    def commit(self, output: ForwardOutput, counts: Tensor) -> None:
        """Commit the first counts[b] >= 0 of each row's tokens; the rest leaves no trace.

        counts (B,) on the CPU. Whole or not at all: after an error (memory) the cache is what it
        was. ValueError (one line) for the output of an earlier pass.
        """
        if output.version is not self.version:
            raise ValueError(
                "output is of an earlier pass over this cache, and its keys have been overwritten; "
                "verify the tokens again"
            )
        self.version = Version()
        newest, lengths = self._newest(output.hidden, counts), self.lengths + counts
        if self.output_buffer is not None:
            sizes = self.num_rows, self.num_past, self.num_past + output.hidden.shape[1]
            self.output_buffer = with_room(self.output_buffer, *sizes)
            self._write_behind([self.output_buffer], [output.hidden])
        # Nothing can fail behind this: who made the output may follow the cache from here on.
        mambas = iter(output.states_after(counts))
        for index, old in enumerate(self.buffers):
            if isinstance(old, MambaState):
                self.buffers[index] = next(mambas)
        self.last_hidden, self.lengths = newest, lengths

    def _newest(self, hidden: Tensor, counts: Tensor) -> Tensor:
        """Each row's output (B, D) at the last of its counts[b] tokens; the old one where none."""
        first, *others = counts.tolist()
        if first > 0 and all(count == first for count in others):
            return hidden.select(1, first - 1)
        last = (counts - 1).clamp(min=0).to(hidden.device)
        newest = hidden[torch.arange(self.num_rows, device=hidden.device), last]
        before = torch.zeros_like(newest) if self.last_hidden is None else self.last_hidden
        return torch.where((counts > 0).to(hidden.device).unsqueeze(1), newest, before)

    def _write_behind(self, buffers: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Put parts (B, L, ...) behind each row's last token in its buffer."""
        if not parts:
            return
        num_rows, start, length = self.num_rows, self.num_past, parts[0].shape[1]
        if self.is_uniform:
            indices = slice(num_rows), slice(start, start + length)
            torch._foreach_copy_([buffer[indices] for buffer in buffers], list(parts))
            return
        # Tokens beyond a row's count land behind its length: the mask hides them, the next call
        # overwrites them.
        device = parts[0].device
        positions = (self.lengths.unsqueeze(1) + torch.arange(length)).to(device)
        rows = torch.arange(num_rows, device=device).unsqueeze(1)
        for buffer, part in zip(buffers, parts, strict=True):
            buffer[rows, positions] = part.to(buffer.dtype)


def _keys(states: Sequence[object]) -> list[Tensor]:
    return [part for state in states if isinstance(state, KV) for part in state]


def with_room(buffer: Tensor, num_rows: int, num_past: int, length: int) -> Tensor:
    """The buffer, or a grown copy of num_past tokens, with room for num_rows rows of `length`."""
    rows, tokens = buffer.shape[:2]
    if num_rows <= rows and length <= tokens:
        return buffer
    if length > tokens:
        tokens = length + min(max(tokens, _MIN_GROWTH), _MAX_GROWTH)
    if num_rows > rows:
        rows = max(num_rows, rows + rows // 2)
    # Zeros, not empty: a masked key has weight 0, but 0 times stray NaN is NaN.
    grown = buffer.new_zeros(rows, tokens, *buffer.shape[2:])
    if num_past:
        grown[: len(buffer), :num_past] = buffer[:, :num_past]
    return grown
