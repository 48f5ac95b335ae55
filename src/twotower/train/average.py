"""A moving average of the trained weights, for evaluation and export; training never reads it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_WARMUP = 10  # steps: the average forgets the weights of the start as fast as it can afford to


class WeightAverage:
    """`value <- d value + (1 - d) weight` after each step, for every weight that is trained.

    d grows to `decay` as step / (step + 10), so that short runs do not stay at their start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (1 = after the first)."""
        decay = min(self._decay, step / (step + _WARMUP))
        for name, weight in self._trained.items():
            self.values[name].lerp_(weight, 1.0 - decay)

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's values."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """While entered, the model has the average's values; afterwards its own, bit for bit."""
        own = {name: weight.detach().clone() for name, weight in self._trained.items()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._trained.items():
            weight.copy_(values[name])
