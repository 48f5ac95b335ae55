"""A sampler of rows that are given one by one, as tests think of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twotower.diffusion import Remask, Sampler, SamplerKind, Schedule


@dataclass(frozen=True, kw_only=True)
class RowSampler:
    """One row's part of a sampler, and what it shares."""

    kind: SamplerKind = "confidence"
    steps: int = 16
    threshold: float = 0.9
    schedule: Schedule = "linear"
    remask: Remask = "confidence"
    adaptive: bool = False
    reuse_unchanged: bool = True
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    mask_token_id: int = 3


def sampler_of(rows: RowSampler | Sequence[RowSampler], num_rows: int | None = None) -> Sampler:
    """The sampler of all rows; of num_rows alike where only one is given."""
    each = [rows] * (num_rows or 1) if isinstance(rows, RowSampler) else list(rows)
    first = each[0]
    return Sampler(
        temperature=torch.tensor([row.temperature for row in each]),
        top_k=torch.tensor([row.top_k for row in each]),
        top_p=torch.tensor([row.top_p for row in each]),
        min_p=torch.tensor([row.min_p for row in each]),
        steps=torch.tensor([row.steps for row in each]),
        threshold=torch.tensor([row.threshold for row in each]),
        kind=first.kind,
        schedule=first.schedule,
        remask=first.remask,
        adaptive=first.adaptive,
        reuse_unchanged=first.reuse_unchanged,
        mask_token_id=first.mask_token_id,
    )
