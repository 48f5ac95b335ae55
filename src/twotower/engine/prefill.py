"""How rows begin: whether memory allows it, and how their prompts are read, piece by piece."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from twotower.engine.ar import AR
from twotower.engine.batch import Batch, DecodingMode, kind_of
from twotower.engine.blocks import BLOCKS
from twotower.engine.given import GIVEN
from twotower.engine.mock_ar import MOCK_AR
from twotower.engine.prefix_cache import PrefixCache
from twotower.engine.resolved import Mode
from twotower.engine.row import Row
from twotower.engine.speculative import SPECULATIVE
from twotower.memory import available_bytes
from twotower.model import TwoTower
from twotower.model.two_tower import PREFILL_CHUNK

DECODING_MODES: Mapping[Mode, DecodingMode] = {
    "diffusion": BLOCKS,
    "posterior": BLOCKS,
    "predict-and-noise": BLOCKS,
    "speculative": SPECULATIVE,
    "ar": AR,
    "mock-ar": MOCK_AR,
}
# Tokens of prompts that are read at a time; then other rows decode, and may leave.
READ_TOKENS = 1024


def refusal(device: torch.device, token_bytes: int, present: Sequence[Row], row: Row) -> str | None:
    """Why a row cannot share a batch with those present of its kind: their keys and values, of so
    many bytes a token, would not fit into the device's memory. One line, or None when they do.
    """
    rows = [*(other for other in present if kind_of(other) == kind_of(row)), row]
    num_prompt = max(len(row.prompt) for row in rows)
    num_new = max(row.options.max_new_tokens + row.options.block_size for row in rows)
    lack = lacking_memory(device, token_bytes, len(rows) * (num_prompt + num_new))
    if lack is None:
        return None
    return (
        f"a prompt of {num_prompt} tokens in {len(rows)} rows needs {lack}; shorten it or send "
        "fewer rows at once"
    )


def lacking_memory(device: torch.device, token_bytes: int, num_tokens: int) -> str | None:
    """What a device's cache of so many tokens needs and what is free; None where it is enough."""
    # Buffers have room for up to half as many more rows, and a grown one is a copy.
    needed = 2 * num_tokens * token_bytes
    free = available_bytes(device, needed)
    if free is None or needed <= free:
        return None
    return f"about {needed / 1e9:.1f} GB of cache and {free / 1e9:.1f} GB are free"


def open_batches(model: TwoTower, rows: Sequence[Row], are_alone: bool) -> Iterator[Batch]:
    """Batches of rows of one kind whose prompts differ in length by less than a factor of two:
    reading them together, padded, costs less than twice what they cost alone.
    """
    groups: dict[object, list[list[Row]]] = {}
    for row in rows:
        size = 1 << len(row.prompt).bit_length()
        own = groups.setdefault((kind_of(row), size), [])
        if own and not are_alone and (len(own[-1]) + 1) * size <= READ_TOKENS:
            own[-1].append(row)
        else:
            own.append([row])
    for some in itertools.chain.from_iterable(groups.values()):
        mode = GIVEN if some[0].given else DECODING_MODES[some[0].options.mode]
        cache = model.empty_cache(len(some), keeps_outputs=some[0].keeps_context)
        yield Batch(model, mode, some, cache)


def read_prompts(batch: Batch, prefixes: PrefixCache | None) -> None:
    """Read prompts on, READ_TOKENS of all rows together, in pieces as the model says. A prefix
    cache reads in its own way; it keeps no outputs of the tower.
    """
    num_left = READ_TOKENS // len(batch.rows)
    if prefixes is not None and not batch.rows[0].keeps_context:
        prefixes.read_prompt(batch, num_left)
        return
    while num_left > 0 and not batch.has_read:
        batch.read(PREFILL_CHUNK)
        num_left -= PREFILL_CHUNK
