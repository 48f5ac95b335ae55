"""The backend for GPUs: each pass is recorded once for its shape, as a CUDA graph, and replayed.

The layers are those of every other pass. Rows, tokens and room for the past are rounded up to
powers of two, so that few recordings serve all batches. On a CPU the same functions run as they
are, which is for tests: there is nothing to record.
"""

import importlib.util
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from twotower.diffusion import NOT_FINITE, Sampler, Step, gumbel
from twotower.graphs import passes
from twotower.graphs.arena import Arena, Recording, bucket, copies, on_host
from twotower.kernels import expert_products
from twotower.kernels.mixing import Kernels
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaInputs, MambaState, states_after
from twotower.layers.moe import Experts
from twotower.layers.quantised import QuantisedExperts
from twotower.model.backend import ContextInput, PassCosts
from twotower.model.delta import apply_delta
from twotower.model.eager import EagerBackend
from twotower.model.precision import M, rounded_to_eight_bits, shared_copy
from twotower.model.state import ContextCache, ForwardOutput
from twotower.model.two_tower import TwoTower
from twotower.model.view import ContextView, LayerState, map_states
from twotower.specs import MoESpec

_MAX_RECORDED = 64  # tokens a row: a longer pass has arithmetic enough to hide its launches
_MAX_ARENAS = 4  # numbers of rows whose memory is kept, the newest
ONE_DEVICE = "graphs passes need both towers on one device"
_log = logging.getLogger(__name__)
T = TypeVar("T")


class GraphsBackend:
    """Passes of a model that `twotower.backends.refusal` lets through.

    quantization=int8 rounds the projections and heads now; tokens stay as they are. The weights
    must not move afterwards. ValueError (one line) for towers on two devices, and for experts whose
    products the GPU cannot make by itself.
    """

    name = "graphs"
    decode_steps = 8  # a reader sees tokens that much later
    prefix_chunk = EagerBackend.prefix_chunk
    verifies_trees, chooses_tokens = False, True
    rank = best_after = None

    def __init__(self, model: TwoTower, quantization: str = "none") -> None:
        self.quantization, self._device = quantization, model.context_device
        if model.denoiser_device != self._device:
            raise ValueError(ONE_DEVICE)
        self._model = model if quantization == "none" else rounded_to_eight_bits(model)
        self.dtype: torch.dtype = model.context_tower.norm_f.weight.dtype
        self.kv_dtype = self.dtype
        reason = fused_refusal(self._device)
        if reason is None:
            from twotower.kernels.fused import FUSED  # needs triton

            self._model = with_kernels(self._model, FUSED)
        else:
            _log.info("graphs passes keep PyTorch's kernels: %s", reason)
        self._pool: Any = None
        if self._device.type == "cuda":
            self._require_experts_without_the_host(reason)
            self._pool = torch.cuda.graph_pool_handle()
        self.pass_costs = _pass_costs(self._model)
        self._arenas: dict[int, Arena] = {}
        self._lock = threading.Lock()  # two threads may run passes at the same time

    def _require_experts_without_the_host(self, unfused: str | None) -> None:
        """unfused: why there are no fused kernels."""
        parts = list(self._model.modules())
        if not all(
            expert_products.can_group(part.up_proj) for part in parts if isinstance(part, Experts)
        ):
            raise ValueError(
                f"graphs passes need a {MoESpec.label} in bfloat16, its widths multiples of 8, "
                "and a GPU of compute capability 9.0 or newer"
            )
        if unfused is not None and any(isinstance(part, QuantisedExperts) for part in parts):
            raise ValueError(f"graphs passes run no {MoESpec.label} in int8 here: {unfused}")

    @torch.no_grad()
    def context_pass(self, cache: ContextCache, asked: ContextInput) -> ForwardOutput:
        """Keys go where they belong in the mirror; a draft's Mamba states wait for its counts."""
        tokens, counts, is_draft, _ = asked  # no tree, which is not verified here
        layers, (num_rows, length) = cache.layers, tokens.shape
        padded = bucket(length) if length <= _MAX_RECORDED else length
        with self._lock:
            arena = self._arena(num_rows)
            past = arena.reserve(cache.num_past + padded)
            read = partial(passes.read, self._model, arena, padded, past, is_draft)
            run = self._recorded(arena, padded, (past, is_draft), read)
            arena.load(layers, cache.lengths, cache.version)
            arena.ids("tokens", padded)[:num_rows, :length] = tokens
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
                if arena.turn == turn:  # the mirror has seen no other pass
                    arena.put_mamba(found)
                    arena.hold(cache.version)
            return found

        return cache.output_of(hidden, kept, committed)

    @torch.no_grad()
    def context_head(self, hidden: Tensor) -> Tensor:
        """The context tower's logits."""
        logits: Tensor = self._model.context_lm_head(hidden)
        return logits

    @torch.no_grad()
    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """All passes of a block read the same mirror, which is filled once."""
        num_rows, length = block.shape
        with self._lock:
            arena = self._arena(num_rows)
            past = arena.reserve(view.num_past)
            denoise = partial(passes.denoise, self._model, arena, length, past, t is not None)
            run = self._recorded(arena, length, (past, t is not None, "denoise"), denoise)
            self._load_view(arena, view)
            arena.ids("blocks", length)[:num_rows] = block
            if t is not None:
                arena.t[:num_rows] = t.to(self._device)
            return run()[:num_rows].clone()

    def decode(
        self,
        cache: ContextCache,
        drafts: Tensor,
        lengths: Tensor,
        sampler: Sampler,
        noise: Tensor | None,
        num_steps: int,
    ) -> tuple[Tensor, Tensor]:
        """The mirror moves on by itself; the cache follows once the host has seen the tokens."""
        num_rows, length = drafts.shape
        before, padded = cache.lengths, bucket(length)
        vocab_size = self._model.config.vocab_size
        with self._lock, torch.no_grad():
            arena = self._arena(num_rows)
            past = arena.reserve(cache.num_past + padded + num_steps - 1)
            uses = arena.choosing.load(sampler, sampler.unused_ids, vocab_size)
            decode = partial(passes.decode, self._model, arena, padded, past, uses)
            run = self._recorded(arena, padded, (past, uses, "decode"), decode)
            arena.load(cache.layers, before, cache.version)
            arena.ids("tokens", padded)[:num_rows, :length] = drafts
            arena.counts.zero_()
            arena.counts[:num_rows] = lengths
            arena.forget()  # until it is committed
            found = []
            for step in range(num_steps):
                if noise is not None:
                    own = noise[:, step : step + length]
                    arena.choosing.noise(padded, vocab_size)[:num_rows, :length] = own
                found.append(copies(run()))
            choices = torch.cat([one for one, _ in found], dim=1)
            stay = torch.stack([stay for _, stay in found]).sum(0)
            choices, counts = on_host(
                [choices[:num_rows, : length + num_steps - 1], stay[:num_rows]]
            )
            is_read = torch.arange(choices.shape[1]) < lengths.unsqueeze(1) + num_steps - 1
            if bool((is_read & (choices < 0)).any()):
                raise ValueError(NOT_FINITE)
            apply_delta(cache, arena.delta_since(before, counts))
            arena.hold(cache.version)
        return choices, counts

    def fill(
        self,
        view: ContextView,
        blocks: Tensor,
        sampler: Sampler,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        """Commits are part of a pass; rows that are done pass with the others and do not change."""
        self._model.denoiser()  # there is one
        tokens, mask = blocks.cpu(), self._model.config.mask_token_id
        confidence = (tokens != mask).float()
        nfe, index = torch.zeros(len(tokens), dtype=torch.int64), 0
        while bool((tokens == mask).any()):
            block = tokens, confidence
            for t, tokens, confidence in self._fill_on(view, block, sampler, generators, index):
                if not bool(t.any()):
                    break  # all were done before the host synchronised
                if bool(confidence.isnan().any()):
                    raise ValueError(NOT_FINITE)
                nfe = nfe + (t > 0)
                yield Step(
                    index=index,
                    rows=t.nonzero().flatten(),
                    t=t,
                    tokens=tokens,
                    is_masked=tokens == mask,
                    confidence=confidence,
                    nfe=nfe,
                )
                index += 1
        with self._lock:
            self._arena(len(tokens)).quickest.append(max(1, index))

    @torch.no_grad()
    def _fill_on(
        self,
        view: ContextView,
        block: tuple[Tensor, Tensor],
        sampler: Sampler,
        generators: Sequence[torch.Generator],
        index: int,
    ) -> list[list[Tensor]]:
        """Passes from number `index` on over blocks, tokens and confidence (R, T): after each its
        t, and the blocks. The host first synchronises after as many passes as the newest blocks
        took at least; where noise is drawn, after each, for only open rows draw.
        """
        tokens, vocab_size = block[0], self._model.config.draft_vocab_size
        num_rows, length = tokens.shape
        unused = sampler.unused_ids if self._model.draft_ids is None else ()
        most = max(sampler.steps.tolist())
        with self._lock:
            arena = self._arena(num_rows)
            past, choosing = arena.reserve(view.num_past), arena.choosing
            uses = choosing.load(sampler, unused, vocab_size)
            fill = partial(passes.fill, self._model, arena, length, past, uses, most == 1)
            run = self._recorded(arena, length, (past, uses, most == 1, "fill"), fill)
            self._load_view(arena, view)
            arena.ids("blocks", length)[:num_rows] = tokens
            arena.confidence(length)[:num_rows] = block[1]
            choosing.steps[:num_rows] = sampler.steps - index
            if uses.noise:
                is_drawn = (tokens == self._model.config.mask_token_id).any(1)
                rows = (is_drawn & (sampler.temperature > 0)).nonzero().flatten()
                noise = gumbel((length, vocab_size), [generators[row] for row in rows.tolist()])
                choosing.noise(length, vocab_size)[rows.to(self._device)] = noise.to(self._device)
            syncs_each = uses.noise or index > 0
            num_passes = 1 if syncs_each else min(most, min(arena.quickest, default=1))
            found = [part[:num_rows] for _ in range(num_passes) for part in copies(run())]
            parts = on_host(found)
            return [parts[i : i + 3] for i in range(0, len(parts), 3)]

    def _load_view(self, arena: Arena, view: ContextView) -> None:
        lengths = view.lengths
        if lengths is None:
            lengths = torch.full((view.num_rows,), view.num_past)
        layers = map_states(view.layers, lambda part: part.squeeze(1), MambaState)
        arena.load(layers, lengths, view.version)
        hidden = arena.hidden[: view.num_rows]
        hidden.copy_(torch.zeros_like(hidden) if view.hidden is None else view.hidden.squeeze(1))

    def _arena(self, num_rows: int) -> Arena:
        """The arena for so many rows; where there are many, the one not used for longest goes."""
        size = bucket(num_rows)
        found = self._arenas.pop(size, None)
        if found is None:
            if len(self._arenas) == _MAX_ARENAS:
                del self._arenas[next(iter(self._arenas))]
            norm = self._model.context_tower.norm_f.weight
            found = Arena(self._model.empty_cache(size), norm.new_zeros(size, len(norm)))
        self._arenas[size] = found
        return found

    def _recorded(
        self, arena: Arena, length: int, shape: tuple[Hashable, ...], run: Callable[[], T]
    ) -> Callable[[], T]:
        """The pass as a recording; the pass itself on a CPU, or where it has many tokens."""
        if self._pool is None or length > _MAX_RECORDED:
            return run
        if (length, *shape) not in arena.recordings:
            arena.clear()  # recording runs the pass
            arena.recordings[length, *shape] = Recording(run, self._pool, self._device)
        found: Callable[[], T] = arena.recordings[length, *shape]
        return found


def with_kernels(module: M, kernels: Kernels) -> M:
    """The module and all below it, weights shared, with other kernels."""
    found = shared_copy(module)
    for part in found.modules():
        if isinstance(getattr(part, "kernels", None), Kernels):
            part.kernels = kernels  # type: ignore[assignment]  # not a module
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


def _pass_costs(model: TwoTower) -> PassCosts:
    """AR steps by the weights that a pass streams: n tokens choose E (1 - (1 - M/E)^n) different
    ones of E experts, if all are as likely.
    """
    layers = model.context_tower.layers
    stacks = [m for m in layers.modules() if isinstance(m, Experts | QuantisedExperts)]
    total, routed = _num_bytes(layers, model.context_lm_head), _num_bytes(*stacks)
    spec = model.config.context.shared_spec(MoESpec)

    def streamed(num_tokens: int) -> float:
        if spec is None:
            return total
        missed = (1 - spec.experts_per_token / spec.num_experts) ** num_tokens
        return total - routed * missed

    return PassCosts({n: streamed(n) / streamed(1) for n in (1, 4, 8, 16, 32, 64)})


def _num_bytes(*modules: nn.Module) -> int:
    """Of all weights, in whatever precision."""
    tensors = (w for m in modules for w in [*m.parameters(), *m.buffers()])
    return sum(weight.numel() * weight.element_size() for weight in tensors)


def fused_refusal(device: torch.device) -> str | None:
    """Why `kernels.fused` cannot run there, in one sentence, or None if it can."""
    if device.type != "cuda":
        return "fused kernels run on CUDA devices"
    if importlib.util.find_spec("triton") is None:
        return "fused kernels need triton, which is not installed"
    return None
