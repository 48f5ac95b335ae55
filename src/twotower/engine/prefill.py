"""Read the prompts of many rows into one cache, if memory allows."""

from functools import reduce

import torch

from twotower.engine.prefix_cache import PrefixCache
from twotower.engine.row import Row
from twotower.measure import available_bytes
from twotower.model import ContextCache, TwoTower


def prefill(
    model: TwoTower, rows: list[Row], num_unread: int, prefixes: PrefixCache | None
) -> ContextCache:
    """A cache with the rows' prompts, but for their last num_unread tokens."""
    prompts = [row.prompt[: len(row.prompt) - num_unread] for row in rows]
    if prefixes is None:
        return _read_together(model, rows, prompts)
    # One by one: what a row's neighbours are must not decide how its prompt is read.
    caches = []
    for row, prompt in zip(rows, prompts, strict=True):
        cache, row.cached_tokens = prefixes.read(prompt)
        row.context_forwards += row.cached_tokens < len(prompt)
        caches.append(cache)
    return reduce(ContextCache.concat, caches)


def _read_together(model: TwoTower, rows: list[Row], prompts: list[list[int]]) -> ContextCache:
    longest = max(map(len, prompts))
    for row, prompt in zip(rows, prompts, strict=True):
        row.context_forwards += bool(prompt)
    if longest == 0:
        return model.empty_cache(len(rows))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return model.prefill(ids, None if bool((lengths == longest).all()) else lengths)


def refusal(model: TwoTower, rows: list[Row]) -> str | None:
    """Why these rows cannot share a batch: keys and values of their prompts and new tokens would
    not fit into memory. One line, or None when they do.
    """
    weight = model.context_tower.embeddings.weight
    num_prompt = max(len(row.prompt) for row in rows)
    num_new = max(row.options.max_new_tokens + row.options.block_size for row in rows)
    # When rows join or leave, the cache is copied and the old one is freed last.
    needed = (
        2
        * len(rows)
        * (num_prompt + num_new)
        * model.config.context.kv_elements
        * weight.element_size()
    )
    free = available_bytes(weight.device)
    if free is None or needed <= free:
        return None
    return (
        f"a prompt of {num_prompt} tokens in {len(rows)} rows needs about {needed / 1e9:.1f} GB "
        f"of cache and {free / 1e9:.1f} GB are free; shorten it or send fewer rows at once"
    )
