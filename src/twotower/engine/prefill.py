"""Read the prompts of many rows into one cache, if memory allows."""

import torch

from twotower.engine.row import Row
from twotower.measure import available_bytes
from twotower.model import ContextCache, TwoTower


def prefill(model: TwoTower, rows: list[Row], prompts: list[list[int]]) -> ContextCache:
    """A cache with prompts[i] committed in row i; an empty prompt leaves its row empty.

    ValueError when the keys and values of prompts and new tokens would not fit into memory.
    """
    longest = max(map(len, prompts))
    num_new = max(row.options.max_new_tokens + row.options.block_size for row in rows)
    _require_memory(model, len(rows), longest, num_new)
    for row, prompt in zip(rows, prompts, strict=True):
        row.context_forwards += bool(prompt)
    if longest == 0:
        return model.empty_cache(len(rows))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return model.prefill(ids, None if bool((lengths == longest).all()) else lengths)


def _require_memory(model: TwoTower, num_rows: int, num_prompt: int, num_new: int) -> None:
    weight = model.context_tower.embeddings.weight
    # Buffers grow by doubling and the old one is freed last: up to three times the final size.
    needed = (
        3 * num_rows * (num_prompt + num_new) * model.config.kv_elements * weight.element_size()
    )
    free = available_bytes(weight.device)
    if free is not None and needed > free:
        raise ValueError(
            f"a prompt of {num_prompt} tokens in {num_rows} rows needs about {needed / 1e9:.1f} GB "
            f"of cache and {free / 1e9:.1f} GB are free; shorten it or send fewer rows at once"
        )
