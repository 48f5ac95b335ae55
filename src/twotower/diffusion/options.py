"""Options of the block sampler, per row.

Decides what may be asked of denoise_block and what may differ inside one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from twotower.diffusion.noise import SCHEDULES, Schedule
from twotower.diffusion.sampling import SamplingParams

SamplerKind = Literal["confidence", "posterior", "predict-and-noise"]
Remask = Literal["confidence", "margin", "random"]

_SHARED = ("kind", "schedule", "remask", "adaptive", "reuse_unchanged", "mask_token_id")


@dataclass(frozen=True, kw_only=True)
class BlockSampler:
    """How one row's block is denoised.

    steps: most denoiser passes. confidence_threshold: kind "confidence" commits every
    prediction above it (1 or more: only the fixed share of each step). schedule: noise
    schedule of the other two kinds; remask and adaptive: which and how many tokens
    "predict-and-noise" returns to the mask. reuse_unchanged: "posterior" keeps its last
    pass while no token of the row changed. top_k 0 and top_p 1 are off.
    """

    kind: SamplerKind = "confidence"
    steps: int = 16
    confidence_threshold: float = 0.9
    schedule: Schedule = "linear"
    remask: Remask = "confidence"
    adaptive: bool = False
    reuse_unchanged: bool = True
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    mask_token_id: int = 3

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, get_args(SamplerKind)),
            ("schedule", self.schedule, SCHEDULES),
            ("remask", self.remask, get_args(Remask)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} = {value!r}: choose one of {', '.join(allowed)}")
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: must be >= 1; one denoiser pass is the least")
        if not self.confidence_threshold >= 0:
            raise ValueError(
                f"confidence_threshold = {self.confidence_threshold}: must be >= 0; "
                "a probability, or 1 and more to commit by number of steps alone"
            )
        if self.mask_token_id < 0:
            raise ValueError(
                f"mask_token_id = {self.mask_token_id}: must be >= 0; take it from the model config"
            )
        SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def is_random(self) -> bool:
        """Whether a row with these options draws random numbers."""
        return self.temperature > 0 or (
            self.kind == "predict-and-noise" and self.remask == "random"
        )


@dataclass(frozen=True)
class RowOptions:
    """The options that may differ between rows: (B,) tensors.

    steps, threshold live on the block's device; params on CPU, next to the generators.
    """

    steps: Tensor
    threshold: Tensor
    params: SamplingParams

    def select(self, rows: Tensor) -> "RowOptions":
        """The options of some rows (R,) int64."""
        return RowOptions(self.steps[rows], self.threshold[rows], self.params.select(rows))


def collate(
    sampler: BlockSampler | Sequence[BlockSampler], num_rows: int, device: torch.device
) -> tuple[BlockSampler, RowOptions]:
    """Split one sampler, or one per row, into what all rows share and what differs by row.

    Raises ValueError if the number does not fit or the shared fields differ.
    """
    samplers = [sampler] * num_rows if isinstance(sampler, BlockSampler) else list(sampler)
    if len(samplers) != num_rows or not samplers:
        raise ValueError(
            f"sampler: {len(samplers)} given for {num_rows} rows; pass one, or one per row"
        )
    for name in _SHARED:
        values = sorted({str(getattr(s, name)) for s in samplers})
        if len(values) > 1:
            raise ValueError(
                f"{name} = {', '.join(values)}: must be equal for all rows of a batch; "
                "denoise rows that differ in it separately"
            )
    params = SamplingParams(
        temperature=torch.tensor([float(s.temperature) for s in samplers]),
        top_k=torch.tensor([s.top_k for s in samplers]),
        top_p=torch.tensor([float(s.top_p) for s in samplers]),
    )
    steps = torch.tensor([s.steps for s in samplers], device=device)
    threshold = torch.tensor([float(s.confidence_threshold) for s in samplers], device=device)
    return samplers[0], RowOptions(steps, threshold, params)
