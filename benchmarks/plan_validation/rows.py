"""A figure predicted beside the same figure measured."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """`measured`: low and high, equal where one figure was published. `calibrated`: the figure
    helped to set a parameter of the prediction, so it proves nothing.
    """

    group: str
    what: str
    unit: str
    predicted: float
    measured: tuple[float, float]
    calibrated: bool = False
    note: str = ""

    @property
    def ratio(self) -> float:
        """Predicted over measured; 1 inside a range, else over its nearer end."""
        low, high = self.measured
        return self.predicted / min(max(self.predicted, low), high)


def both(value: float | Sequence[float]) -> tuple[float, float]:
    """A figure, or the two ends of a range."""
    if isinstance(value, Sequence):
        low, high = value
        return float(low), float(high)
    return float(value), float(value)


def median_error(rows: Sequence[Row]) -> float:
    """Median of how many times too large or too small predictions are; 1 is perfect."""
    return statistics.median(math.exp(abs(math.log(row.ratio))) for row in rows)


def worst_error(rows: Sequence[Row]) -> float:
    return max(math.exp(abs(math.log(row.ratio))) for row in rows)
