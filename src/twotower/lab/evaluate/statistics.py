"""Intervals of an accuracy and of a retention, by resampling items."""

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
RESAMPLES = 10_000
Interval = tuple[float, float]


def resample_means(correct: Array, seed: int) -> Array:
    """Accuracies of every mode in resampled sets of items: correct (modes, n) -> (10000, modes).

    All modes of a resample share its items: their differences keep the pairing. Items on which all
    modes fare alike are interchangeable, so that only the count of each such kind is drawn.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    n = correct.shape[1]
    kinds, counts = np.unique(correct, axis=1, return_counts=True)  # (modes, kinds)
    chosen = generator.multinomial(n, counts / n, size=RESAMPLES)
    means: Array = chosen @ kinds.T / n
    return means


def interval(values: Array) -> Interval:
    """The central 95 % of resampled values, without those that are not finite."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return (float("nan"), float("nan"))
    low, high = np.quantile(finite, [0.025, 0.975])
    return (float(low), float(high))


def retention(means: Array, mode: int, baseline: int) -> Array:
    """Resampled accuracies of one mode over those of the baseline; nan where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = np.where(means[:, baseline] > 0, means[:, mode] / means[:, baseline], np.nan)
    return ratio
