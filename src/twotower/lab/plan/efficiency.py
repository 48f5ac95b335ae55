"""How far real code stays below a machine's peaks: three numbers, and where each comes from."""

from collections.abc import Mapping
from dataclasses import dataclass

from twotower.lab.plan.hardware import Kind


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peaks that are reached, and seconds of every layer that do no such work.

    `rows_in_turn`: rows of a batch are passes one after another, so they share nothing.
    """

    bandwidth: float
    arithmetic: float
    layer_s: float
    rows_in_turn: bool = False

    def __post_init__(self) -> None:
        for name in ("bandwidth", "arithmetic"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} is a share of the peak; use above 0, at most 1")
        if not 0 <= self.layer_s < 1:
            raise ValueError(f"layer_s={self.layer_s} must be seconds from 0 to below 1")


# benchmarks/plan_validation.py solves for the values that are said to be calibrated and prints
# them; tests/unit/test_plan_validation.py holds the two equal.
PROFILES: Mapping[str, Efficiency] = {
    # What no code can beat.
    "limit": Efficiency(bandwidth=1.0, arithmetic=1.0, layer_s=0.0),
    # Eager code with kernels for the experts. Bandwidth and layer_s: the two AR figures of the
    # DGX Spark port, nothing else. Arithmetic: an assumption, too small a part there to be seen.
    "eager-gpu": Efficiency(bandwidth=0.74, arithmetic=0.5, layer_s=506e-6),
    # The same with launches out of the way (CUDA graphs): layer_s is an assumption.
    "graph-gpu": Efficiency(bandwidth=0.74, arithmetic=0.5, layer_s=20e-6),
    # Our own backends, one thread: AR step and pass of the 160M model, AR step of the shipped one.
    "eager-cpu": Efficiency(bandwidth=0.431, arithmetic=0.263, layer_s=158e-6),
    "native-cpu": Efficiency(bandwidth=0.756, arithmetic=0.969, layer_s=36.3e-6, rows_in_turn=True),
    # The same three with --quantization int8: int8 arithmetic as well.
    "native-int8-cpu": Efficiency(
        bandwidth=0.795, arithmetic=0.658, layer_s=21e-6, rows_in_turn=True
    ),
}
DEFAULTS: Mapping[Kind, str] = {"gpu": "eager-gpu", "unified": "eager-gpu", "cpu": "eager-cpu"}
