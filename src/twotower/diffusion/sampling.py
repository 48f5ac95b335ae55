"""From logits to tokens, for AR decoding and denoising alike.

Rows of one batch belong to different requests: each has its own temperature, top-k,
top-p and generator, so that a row's tokens never depend on its neighbours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PerRow = float | Tensor  # one value for all rows, or a tensor (B,)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose a token; each field is one value for all rows or a tensor (B,).

    temperature 0 means argmax (top_k, top_p then change nothing); top_k 0 and top_p 1 are off.
    """

    temperature: PerRow = 0.0
    top_k: PerRow = 0
    top_p: PerRow = 1.0

    def __post_init__(self) -> None:
        _require(self.temperature, "temperature", 0.0, float("inf"), "0 means greedy")
        _require(self.top_k, "top_k", 0, float("inf"), "0 means off")
        _require(self.top_p, "top_p", 0.0, 1.0, "1 means off")
        if 0 in _values(self.top_p):
            raise ValueError("top_p = 0: must be in (0, 1]; for greedy choice set temperature 0")

    @cached_property
    def is_greedy(self) -> bool:
        """Whether every row has temperature 0."""
        return max(_values(self.temperature), default=0.0) == 0

    def select(self, rows: Tensor) -> "SamplingParams":
        """The parameters of some rows (R,) int64."""

        def pick(value: PerRow) -> PerRow:
            values = torch.as_tensor(value)
            return value if values.ndim == 0 else values[rows.to(values.device)]

        return SamplingParams(
            temperature=pick(self.temperature), top_k=pick(self.top_k), top_p=pick(self.top_p)
        )


def _require(value: PerRow, name: str, low: float, high: float, remedy: str) -> None:
    """Raise ValueError unless low <= value <= high and finite, for every row."""
    bad = [v for v in _values(value) if not (low <= v <= high and math.isfinite(v))]
    if bad:
        shown = bad[0]
        limit = f"in [{low:g}, {high:g}]" if high < float("inf") else f"finite and >= {low:g}"
        raise ValueError(f"{name} = {shown:g}: must be {limit}; {remedy}")


def _values(value: PerRow) -> list[float]:
    """As plain numbers: they are few, and tensor operations would cost more than a small model."""
    return value.flatten().tolist() if isinstance(value, Tensor) else [value]


def _column(value: PerRow, logits: Tensor) -> Tensor:
    """A scalar or (B,) value, shaped to broadcast against logits (B, ..., V)."""
    values = torch.as_tensor(value, device=logits.device)
    if values.ndim == 0:
        return values
    return values.view(-1, *[1] * (logits.ndim - 1))


def filter_logits(
    logits: Tensor, temperature: PerRow = 1.0, top_k: PerRow = 0, top_p: PerRow = 1.0
) -> Tensor:
    """Scale by 1/temperature and set what top-k and then top-p exclude to -inf.

    logits (B, ..., V); returns the same shape in float32, shifted so that the largest is 0
    (a tiny temperature cannot overflow). Temperature 0 leaves the scale alone. Exactly
    top_k tokens stay, the lower id at a tie; top-p keeps the smallest set, at least one
    token, that reaches the mass top_p of what top-k left.
    """
    scale = _column(temperature, logits).float()
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / torch.where(scale > 0, scale, 1.0)
    # asked of the values where they are: CPU parameters cost a GPU no synchronisation
    if not bool((torch.as_tensor(top_k) > 0).any()) and bool((torch.as_tensor(top_p) >= 1).all()):
        return logits
    k, p = _column(top_k, logits), _column(top_p, logits)
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ranked = ranked.masked_fill((k > 0) & (rank >= k), float("-inf"))
    probs = ranked.softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    beyond = (p < 1) & (mass_before >= p) & (rank > 0)
    ranked = ranked.masked_fill(beyond, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ranked)


def gumbel(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard Gumbel noise (len(generators), *shape), float32 on CPU.

    One CPU generator per row: a row's draws are the same alone and in any batch.
    """
    noise = torch.empty(len(generators), *shape)
    for row, generator in enumerate(generators):
        noise[row].exponential_(generator=generator)
    # the clamp keeps log finite: an infinite draw plus a filtered -inf would be NaN
    return noise.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_()


def uniform(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform [0, 1) noise (len(generators), *shape), float32 on CPU, one generator per row."""
    return torch.stack([torch.rand(*shape, generator=generator) for generator in generators])


def draw_noise(
    logits: Tensor, temperature: PerRow, generators: Sequence[torch.Generator]
) -> Tensor | None:
    """Gumbel noise for choose, shaped like logits (B, ..., V); None if every row is greedy.

    Only rows with temperature > 0 draw; greedy rows get zeros and leave their generator alone.
    """
    num_rows = logits.shape[0]
    temperatures = _values(temperature)
    if len(temperatures) == 1:
        temperatures = temperatures * num_rows
    rows = [row for row, value in zip(range(num_rows), temperatures, strict=True) if value > 0]
    if not rows:
        return None
    noise = gumbel(logits.shape[1:], [generators[row] for row in rows]).to(logits.device)
    if len(rows) == num_rows:
        return noise
    return torch.zeros_like(logits, dtype=torch.float32).index_copy_(
        0, torch.tensor(rows, device=logits.device), noise
    )


def choose(logits: Tensor, params: SamplingParams, noise: Tensor | None = None) -> Tensor:
    """Choose one token per position: logits (B, ..., V) -> int64 (B, ...).

    Rows at temperature 0 take exactly the argmax; others the Gumbel-max of the filtered
    distribution with noise from draw_noise. Raises ValueError if noise is missing.
    """
    greedy = logits.argmax(-1)
    if noise is None:
        if not params.is_greedy:
            raise ValueError("noise = None: temperature > 0 needs noise; pass draw_noise(...)")
        return greedy
    filtered = filter_logits(logits, params.temperature, params.top_k, params.top_p)
    is_sampled = _column(params.temperature, greedy) > 0
    return torch.where(is_sampled, (filtered + noise).argmax(-1), greedy)
