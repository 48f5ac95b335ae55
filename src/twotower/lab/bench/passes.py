"""How long one pass takes: an AR step, a denoiser pass, an extension, a verification."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.model import ContextCache, TwoTower
from twotower.model.rows import select_rows

WARM_UP = 3
Call = Callable[[TwoTower, ContextCache], object]


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """How many tokens the context holds, a block has, and how often each call is timed."""

    num_past: int
    block_size: int
    repeats: int
    seed: int


def time_passes(
    models: Mapping[str, TwoTower], shape: PassShape
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each (engine, call), all taken in turns so that a slow spell hits all.

    Each call gets a cache of its own; copying it is not timed.
    """
    calls = make_calls(next(iter(models.values())), shape)
    caches = {name: _fill_cache(model, shape) for name, model in models.items()}
    times: dict[tuple[str, str], list[float]] = {(e, c): [] for e in models for c in calls}
    row = torch.tensor([0])
    for repeat in range(WARM_UP + shape.repeats):
        for engine, model in models.items():
            for name, call in calls.items():
                cache = select_rows(caches[engine], row)
                start = time.perf_counter()
                call(model, cache)
                if repeat >= WARM_UP:
                    times[engine, name].append(1e3 * (time.perf_counter() - start))
    return times


def make_calls(model: TwoTower, shape: PassShape) -> dict[str, Call]:
    """The passes by name, on a model and a cache of one row."""
    size = shape.block_size
    block = torch.full((1, size), model.config.mask_token_id)
    tokens = _draw_ids(model, size, shape.seed)
    t = torch.ones(1)
    counts = torch.tensor([size // 2])

    def step(model: TwoTower, cache: ContextCache) -> Tensor:
        model.extend(cache, tokens[:, :1])
        return model.next_logits(cache)

    def verify(model: TwoTower, cache: ContextCache) -> Tensor:
        output = model.verify(cache, tokens)
        logits = model.context_head(output.hidden)
        cache.commit(output, counts)
        return logits

    return {
        "ar_step": step,
        "denoise_pass": lambda model, cache: model.denoise(block, cache.view(), t),
        "extend": lambda model, cache: model.extend(cache, tokens),
        "verify": verify,
    }


def _fill_cache(model: TwoTower, shape: PassShape) -> ContextCache:
    return model.prefill(_draw_ids(model, shape.num_past, shape.seed))


def _draw_ids(model: TwoTower, count: int, seed: int) -> Tensor:
    """Random ordinary token ids (1, count)."""
    return draw_ids(model, (1, count), torch.Generator().manual_seed(seed))


def draw_ids(model: TwoTower, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random ids of a shape, of tokens that are not special to the model."""
    config = model.config
    named = {config.mask_token_id, config.bos_token_id, config.pad_token_id, *config.eos_token_ids}
    special = {*named, *model.unused_ids}
    ordinary = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    return ordinary[torch.randint(len(ordinary), shape, generator=generator)]
