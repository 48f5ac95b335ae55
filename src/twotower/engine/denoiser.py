"""Where blocks are denoised: beside the context tower, or by a denoiser that is elsewhere."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from twotower.diffusion import Sampler, Step, denoise_block, most_probable, require_finite
from twotower.engine.choosing import ChoosingBackend
from twotower.engine.row import Row
from twotower.model import ContextCache, ContextView, TwoTower


class Blocks(NamedTuple):
    """What is to be filled: blocks (R, T) of the rows in slots (R,) of a batch; None: of all."""

    tokens: Tensor
    sampler: Sampler
    generators: Sequence[torch.Generator]
    slots: Tensor | None


class Denoiser(Protocol):
    """Fills blocks of one batch after another whose rows are mostly the same."""

    def fill(self, rows: Sequence[Row], cache: ContextCache, blocks: Blocks) -> Iterator[Step]:
        """`denoise_block` on the blocks, with the texts of the batch's rows as their context."""


class LocalDenoiser:
    """On the context tower's device: the cache itself is read."""

    def __init__(self, model: TwoTower) -> None:
        self._model = model

    def fill(self, rows: Sequence[Row], cache: ContextCache, blocks: Blocks) -> Iterator[Step]:
        return denoise_rows(self._model, cache.view(self._model.config.reads), blocks)


def denoise_rows(model: TwoTower, view: ContextView, blocks: Blocks) -> Iterator[Step]:
    """`denoise_block` on blocks of a view's rows, by this process's denoiser tower."""
    tokens, sampler, generators, slots = blocks
    own = view if slots is None or len(slots) == view.num_rows else view.select(slots)
    if model.backend.chooses_tokens and sampler.kind == "confidence":
        return cast(ChoosingBackend, model.backend).fill(own, tokens, sampler, generators)
    held = list(range(own.num_rows)), own  # rows of a view are copied only when they change

    def denoise(tokens: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        nonlocal held
        if (wanted := rows.tolist()) != held[0]:
            held = wanted, own.select(rows)
        return require_finite(model.denoise(tokens, held[1], t))

    tokens = tokens.to(model.denoiser_device)
    rank = model.backend.rank or most_probable
    return denoise_block(denoise, tokens, sampler, generators, model.draft_ids, rank)
