"""How the rows of a batch choose tokens, as a record."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

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
