"""From logits to tokens, for AR decoding and denoising alike.

Each row of a batch has its own options and generator, so that its tokens never depend on its
neighbours. What chance does is in `chance`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from twotower.diffusion.chance import column, filter_logits
from twotower.diffusion.noise import Schedule

SamplerKind = Literal["confidence", "posterior", "predict-and-noise"]
Remask = Literal["confidence", "margin", "random"]
PER_ROW = ("temperature", "top_k", "top_p", "min_p", "steps", "threshold")  # fields of a sampler


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the rows of a batch choose tokens. A plain record: its values are valid.

    temperature 0 is argmax; top_k 0, top_p 1 and min_p 0 are off, and has_min_p and has_ranks
    (top-k or top-p) may be False where they are in all rows, which saves their work. Of blocks:
    steps are the most denoiser passes; kind "confidence" commits predictions above threshold (1 and
    more: the fixed share of each step alone); schedule is that of the other two kinds; remask and
    adaptive say which and how many tokens "predict-and-noise" returns to the mask; with
    reuse_unchanged "posterior" keeps its last pass while no token of the row changed.
    """

    temperature: Tensor  # these are (B,); on the CPU, where generators are
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    steps: Tensor
    threshold: Tensor
    kind: SamplerKind = "confidence"
    schedule: Schedule = "linear"
    remask: Remask = "confidence"
    adaptive: bool = False
    reuse_unchanged: bool = True
    mask_token_id: int
    unused_ids: tuple[int, ...] = ()  # of the vocabulary, that are no token: never chosen
    has_min_p: bool = True
    has_ranks: bool = True
    num_others: int = 0  # tokens that a step of a block tells beside those that it chose

    @cached_property
    def is_greedy(self) -> bool:
        """Whether every row has temperature 0."""
        return max(self.temperature.tolist(), default=0.0) == 0

    @property
    def is_random(self) -> bool:
        """Whether any row draws random numbers."""
        is_drawn = self.kind == "predict-and-noise" and self.remask == "random"
        return is_drawn or not self.is_greedy

    def select(self, rows: Tensor) -> "Sampler":
        """The sampler of some rows (R,) int64."""
        values: list[tuple[str, Any]] = [(name, getattr(self, name)) for name in PER_ROW]
        return replace(self, **{name: all_[rows.to(all_.device)] for name, all_ in values})


NOT_FINITE = (
    "the model's logits are not finite; its weights are damaged or too large for its dtype: check "
    "the checkpoint, or load it with dtype=float32"
)


def require_finite(logits: Tensor) -> Tensor:
    """The logits themselves; ValueError if any is NaN or infinite, which argmax would hide."""
    # A finite sum has finite terms, and is found in a fifth of the time.
    if not math.isfinite(logits.sum().item()) and not bool(torch.isfinite(logits).all()):
        raise ValueError(NOT_FINITE)
    return logits


def ban(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Logits (..., V) with -inf for ids that must not be chosen; an id past V is none already."""
    known = [i for i in ids if i < logits.shape[-1]]
    if not known:
        return logits
    if len(known) == 1:  # no index has to travel to a GPU
        banned = logits.clone()
        banned.select(-1, known[0]).fill_(float("-inf"))
        return banned
    return logits.index_fill(-1, torch.tensor(known, device=logits.device), float("-inf"))


def argmax(logits: Tensor) -> Tensor:
    """The best id (...) of logits (..., V), the lower one at a tie."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # torch's takes 12 times as long: 2.3 ms for 27 rows of 49,152 (AVX-512).
        return torch.from_numpy(np.asarray(logits.numpy().argmax(-1)))
    return logits.argmax(-1)


def choose(logits: Tensor, sampler: Sampler, noise: Tensor | None = None) -> Tensor:
    """Choose one token per position: logits (B, ..., V) -> int64 (B, ...).

    Rows at temperature 0 take exactly the argmax; others the Gumbel-max of the filtered
    distribution with noise from draw_noise.
    """
    assert noise is not None or sampler.is_greedy, "temperature > 0 needs noise"
    return sample(ban(logits, sampler.unused_ids), sampler, noise)


def sample(logits: Tensor, sampler: Sampler, noise: Tensor | None) -> Tensor:
    """`choose` from logits without unused ids; asks no device for anything."""
    greedy = argmax(logits)
    if noise is None:
        return greedy
    sampled = argmax(filter_logits(logits, sampler) + noise)
    return torch.where(column(sampler.temperature, greedy) > 0, sampled, greedy)
