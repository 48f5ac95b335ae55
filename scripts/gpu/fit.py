"""A machine's own profile of efficiency, solved from measured passes and written for
`twotower plan --efficiency FILE`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from twotower.lab.plan.inputs import Efficiency
from twotower.lab.plan.options import PROFILE_FIELDS
from twotower.lab.plan.passes import Pass, PlanSetup, time_pass

_LARGEST_S = 0.999  # of a layer


class Timed(NamedTuple):
    """A pass and the seconds that it took."""

    setup: PlanSetup
    call: Pass
    seconds: float


def error_of(found: Efficiency, timed: Sequence[Timed]) -> float:
    """By how much predictions are off: the mean logarithm of their ratio to what was measured."""
    return sum(map(abs, _errors(found, timed))) / len(timed)


def fit_efficiency(timed: Sequence[Timed]) -> Efficiency:
    """The three parameters with the least squared error. All are moved by a factor, up, down or not
    at all, as it helps most; where nothing helps, the factor becomes smaller. What no pass depends
    on stays as it is assumed.
    """
    found, factor = Efficiency(bandwidth=0.7, arithmetic=0.5, layer_s=20e-6), 4.0
    while factor > 1.005:
        ways = itertools.product((1.0, factor, 1 / factor), repeat=3)  # the first: stay
        best = min((_moved(found, by) for by in ways), key=lambda one: _squares(one, timed))
        if best == found:
            factor **= 0.5
        found = best
    return found


def _moved(found: Efficiency, by: tuple[float, ...]) -> Efficiency:
    bandwidth, arithmetic, layer_s = by
    return Efficiency(
        bandwidth=min(1.0, found.bandwidth * bandwidth),
        arithmetic=min(1.0, found.arithmetic * arithmetic),
        layer_s=min(_LARGEST_S, found.layer_s * layer_s),
    )


def _squares(found: Efficiency, timed: Sequence[Timed]) -> float:
    return sum(error**2 for error in _errors(found, timed))


def _errors(found: Efficiency, timed: Sequence[Timed]) -> Iterator[float]:
    for setup, call, seconds in timed:
        yield math.log(time_pass(replace(setup, efficiency=found), call).seconds / seconds)


def write_profile(found: Efficiency, file: Path, source: str) -> None:
    """Keep it where the planner reads it; source: where it comes from."""
    values = found.bandwidth, found.arithmetic, found.layer_s * 1e6
    lines = [f"{name} = {value:.4g}" for name, value in zip(PROFILE_FIELDS, values, strict=True)]
    file.write_text("\n".join([f"# {source}", *lines]) + "\n", encoding="utf-8")
