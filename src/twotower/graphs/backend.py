"""The backend for GPUs: each pass is recorded once for its shape, as a CUDA graph, and replayed.

The layers are those of every other pass. Rows, tokens and room for the past are rounded up to
powers of two, so that few recordings serve all batches. On a CPU the same functions run as they
are, which is for tests: there is nothing to record.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from twotower import masks
from twotower.graphs.arena import Arena, Recording, bucket, copies
from twotower.kernels import ops
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaInputs, MambaState, states_after
from twotower.layers.moe import Experts
from twotower.model.backend import EagerBackend, denoiser_logits
from twotower.model.state import ContextCache, ContextView, ForwardOutput, LayerState
from twotower.model.two_tower import TwoTower
from twotower.specs import MoESpec

_MOST_RECORDED = 64  # tokens a row: a longer pass has arithmetic enough to hide its launches
_MOST_ARENAS = 4  # numbers of rows whose memory is kept, the newest
ONE_DEVICE = "graphs passes need both towers on one device"
T = TypeVar("T")


class GraphsBackend:
    """Passes of a model that `twotower.backends.refusal` lets through.

    The weights must not move afterwards. ValueError (one line) for towers on two devices, and for
    experts whose products the GPU cannot make by itself.
    """

    name, quantization = "graphs", "none"
    prefix_chunk = EagerBackend.prefix_chunk

    def __init__(self, model: TwoTower) -> None:
        self._model, self._device = model, model.context_device
        if model.denoiser_device != self._device:
            raise ValueError(ONE_DEVICE)
        self._pool: Any = None
        if self._device.type == "cuda":
            stacks = [m.up_proj for m in model.modules() if isinstance(m, Experts)]
            if not all(map(ops.can_group, stacks)):
                raise ValueError(
                    f"graphs passes need a {MoESpec.label} in bfloat16, its widths multiples of 8, "
                    "and a GPU of compute capability 9.0 or newer"
                )
            self._pool = torch.cuda.graph_pool_handle()
        self.pass_costs: Mapping[int, float] = _pass_costs(model)
        self._arenas: dict[int, Arena] = {}
        self._lock = threading.Lock()  # two threads may run passes at the same time

    def context_pass(
        self, cache: ContextCache, tokens: Tensor, counts: Tensor | None, is_draft: bool
    ) -> ForwardOutput:
        """Keys go where they belong in the mirror; a draft's Mamba states wait for its counts."""
        layers, before = cache.layers, cache.version
        num_rows, length = tokens.shape
        wide = bucket(length) if length <= _MOST_RECORDED else length
        with self._lock:
            arena = self._arena(num_rows)
            past = arena.reserve(cache.num_past + wide)
            read = partial(self._read, arena, wide, past, is_draft)
            run = self._recorded(arena, wide, (past, is_draft), read)
            arena.load(layers, cache.lengths, before)
            arena.ids("tokens", wide)[:num_rows, :length] = tokens
            arena.counts.zero_()
            arena.counts[:num_rows] = length if counts is None else counts.to(self._device)
            arena.forget()  # until it is committed
            turn = arena.turn
            hidden, states = run()
            kept = [_cut(state, num_rows, length) for state in states]
            parts = iter(copies([hidden[:num_rows, :length], *(p for s in kept if s for p in s)]))
            hidden = next(parts)
            kept = [None if s is None else type(s)(*(next(parts) for _ in s)) for s in kept]
            done = None if is_draft else arena.mamba(num_rows)

        def committed(counts: Tensor) -> list[MambaState]:
            found = states_after(_seeded(kept, layers), counts) if done is None else done
            with self._lock:
                # The mirror has seen no other pass, and it is this cache that changes.
                if arena.turn == turn and cache.version is not before:
                    arena.put_mamba(found)
                    arena.hold(cache.version)
            return found

        keys: list[LayerState] = [s if isinstance(s, KV) else None for s in kept]
        return ForwardOutput(hidden, keys, committed)

    def context_head(self, hidden: Tensor) -> Tensor:
        """The context tower's logits."""
        logits: Tensor = self._model.context_lm_head(hidden)
        return logits

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """All passes of a block read the same mirror, which is filled once."""
        self._model.denoiser()  # there is one
        num_rows, length = block.shape
        lengths = view.lengths
        if lengths is None:
            lengths = torch.full((num_rows,), view.num_past)
        with self._lock:
            arena = self._arena(num_rows)
            past = arena.reserve(view.num_past)
            denoise = partial(self._denoise, arena, length, past, t is not None)
            run = self._recorded(arena, length, (past, t is not None, "denoise"), denoise)
            arena.load([_without_blocks(state) for state in view.layers], lengths, view.version)
            arena.ids("blocks", length)[:num_rows] = block
            if view.hidden is not None:
                arena.hidden[:num_rows] = view.hidden.squeeze(1)
            if t is not None:
                arena.t[:num_rows] = t.to(self._device)
            return run()[:num_rows].clone()

    def _read(
        self, arena: Arena, length: int, past: int, is_draft: bool
    ) -> tuple[Tensor, list[KV | MambaInputs | None]]:
        """The context tower over L tokens of every row, and what it leaves for the mirror."""
        mask = masks.causal_rows(length, arena.lengths, past)
        decided = (None, None) if is_draft else (arena.counts, length)
        hidden, states = self._model.context_tower(
            arena.ids("tokens", length), arena.layers(past), mask, *decided, arena.lengths
        )
        arena.keep(states, length)
        # States are large, and the mirror has them: a recording would keep them once more.
        return hidden, [None if isinstance(state, MambaState) else state for state in states]

    def _denoise(self, arena: Arena, length: int, past: int, has_time: bool) -> Tensor:
        """The denoiser tower over blocks of all rows."""
        layers = tuple(
            MambaState(*(part.unsqueeze(1) for part in state))
            if isinstance(state, MambaState)
            else state
            for state in arena.layers(past)
        )
        view = ContextView(layers, None, past, arena.num_rows, arena.hidden.unsqueeze(1))
        mask = masks.full_rows(length, arena.lengths, past)
        t, start = arena.t if has_time else None, arena.lengths.unsqueeze(1)
        return denoiser_logits(self._model, arena.ids("blocks", length), view, mask, t, start)

    def _arena(self, num_rows: int) -> Arena:
        """The arena for so many rows; where there are many, the one not used for longest goes."""
        size = bucket(num_rows)
        found = self._arenas.pop(size, None)
        if found is None:
            if len(self._arenas) == _MOST_ARENAS:
                del self._arenas[next(iter(self._arenas))]
            norm = self._model.context_tower.norm_f.weight
            found = Arena(self._model.empty_cache(size), norm.new_zeros(size, len(norm)))
        self._arenas[size] = found
        return found

    def _recorded(
        self, arena: Arena, length: int, shape: tuple[Hashable, ...], run: Callable[[], T]
    ) -> Callable[[], T]:
        """The pass as a recording; the pass itself on a CPU, or where it has many tokens."""
        if self._pool is None or length > _MOST_RECORDED:
            return run
        if (length, *shape) not in arena.recordings:
            arena.clear()  # recording runs the pass
            arena.recordings[length, *shape] = Recording(run, self._pool, self._device)
        found: Callable[[], T] = arena.recordings[length, *shape]
        return found


def _cut(state: KV | MambaInputs | None, num_rows: int, length: int) -> KV | MambaInputs | None:
    """What is worth a copy of what a pass left: of the rows and tokens that were asked for."""
    if isinstance(state, KV):
        return KV(*(part[:num_rows, :length] for part in state))
    if state is None:
        return None
    before = state.conv.shape[1] - state.dt.shape[1]
    heads, dt, B = (part[:num_rows, :length] for part in (state.heads, state.dt, state.B))
    conv, nothing = state.conv[:num_rows, : before + length], state.ssm[:0]
    return MambaInputs(conv, heads, dt, state.A[:num_rows], B, nothing)


def _seeded(
    kept: Sequence[KV | MambaInputs | None], layers: Sequence[LayerState]
) -> list[MambaInputs]:
    """The Mamba layers' inputs, with the states before them that the cache has."""
    return [
        state._replace(ssm=before.ssm)
        for state, before in zip(kept, layers, strict=True)
        if isinstance(state, MambaInputs) and isinstance(before, MambaState)
    ]


def _without_blocks(state: LayerState) -> LayerState:
    """A layer of a view as a cache has it: Mamba states of one block, without its dimension."""
    if isinstance(state, MambaState):
        return MambaState(*(part.squeeze(1) for part in state))
    return state


def _pass_costs(model: TwoTower) -> dict[int, float]:
    """AR steps by the weights that a pass streams: n tokens choose E (1 - (1 - M/E)^n) different
    ones of E experts, if all are as likely.
    """
    layers = model.context_tower.layers
    total = sum(p.numel() for p in [*layers.parameters(), *model.context_lm_head.parameters()])
    routed = sum(
        p.numel() for m in layers.modules() if isinstance(m, Experts) for p in m.parameters()
    )
    spec = model.config.context.shared_spec(MoESpec)

    def streamed(num_tokens: int) -> float:
        if spec is None:
            return total
        missed = (1 - spec.experts_per_token / spec.num_experts) ** num_tokens
        return total - routed * missed

    return {n: streamed(n) / streamed(1) for n in (1, 4, 8, 16)}
