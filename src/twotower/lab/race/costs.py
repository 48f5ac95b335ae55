"""Arithmetic of a race: medians with spread, speed-ups, and when block decoding pays.

Pure: numbers in, numbers out. Times are milliseconds, costs milliseconds per token.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AR = "ar"
TARGET = 2.42  # the announcement's speed-up of diffusion over AR decoding
Contestant = tuple[str, str]  # engine, mode


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of n measured values."""

    median: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, object]:
        return {"median": self.median, "quartiles": [self.low, self.high], "n": self.n}


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (inclusive); a single value is its own quartiles."""
    if len(values) == 1:
        return Spread(median=values[0], low=values[0], high=values[0], n=1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=middle, low=low, high=high, n=len(values))


def best_ar(costs: Mapping[Contestant, Sequence[float]], engines: Sequence[str]) -> Contestant:
    """The AR contestant of these engines with the lowest median cost."""
    medians = {
        c: statistics.median(values) if values else math.inf
        for c, values in costs.items()
        if c[0] in engines and c[1] == AR
    }
    assert medians, "a race without an AR contestant has nothing to compare with"
    return min(medians, key=lambda contestant: medians[contestant])


def own_ar(engine: str, ours: Sequence[str]) -> Contestant:
    """The AR contestant of an engine of ours; for a rival, that of our first engine."""
    return (engine if engine in ours else ours[0], AR)


def paired_speedup(baseline: Sequence[float], own: Sequence[float]) -> Spread:
    """Baseline's cost over one's own, item by item: costs of the same items in the same order."""
    return spread([theirs / ours for theirs, ours in zip(baseline, own, strict=True)])


def block_cost(
    denoise_ms: float, extend_ms: float, tokens_per_nfe: float, block_size: int
) -> float:
    """Cost of a token: its share of the block's denoiser passes and of the one extension."""
    return denoise_ms / tokens_per_nfe + extend_ms / block_size


def break_even(
    ar_ms: float, denoise_ms: float, extend_ms: float, speedup: float, block_size: int
) -> float | None:
    """Tokens per pass from which blocks are `speedup` times as fast as AR; None: none suffices.

    The block's size is the most that a pass can commit, so a larger answer is None as well.
    """
    left = ar_ms / speedup - extend_ms / block_size  # what a token may cost in passes
    if left <= 0:
        return None
    needed = denoise_ms / left
    return needed if needed <= block_size else None


def cycle_break_even(ar_ms: float, denoise_ms: float, verify_ms: float, speedup: float) -> float:
    """Tokens that a cycle of one draft pass and one verification must accept for the speed-up."""
    return speedup * (denoise_ms + verify_ms) / ar_ms


def tokens_per_nfe(tokens: int, nfe: int) -> float | None:
    """None where no denoiser pass was made."""
    return tokens / nfe if nfe else None
