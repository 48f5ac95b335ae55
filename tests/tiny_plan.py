"""Machines and setups of round numbers for the tests of plans."""

from tiny_models import tiny_config
from twotower.checkpoint.inspect import describe_config
from twotower.lab.plan.hardware import Hardware
from twotower.lab.plan.inputs import PROFILES, Efficiency, Width, Workload, uniform
from twotower.lab.plan.passes import ModelShape, PlanSetup


def machine(**changes: object) -> Hardware:
    """A GPU with 1 GiB, all of it usable, 1 GB/s, 1 Gop/s in bfloat16 and 2 in float32."""
    values: dict[str, object] = {
        "name": "round",
        "kind": "gpu",
        "memory_gib": 1.0,
        "bandwidth_gb_s": 1.0,
        "tflops": {"bfloat16": 0.001, "float32": 0.002},
        "usable": 1.0,
        "source": "made up for tests",
    }
    return Hardware(**(values | changes))  # type: ignore[arg-type]


def setup(
    hardware: Hardware | None = None,
    efficiency: Efficiency = PROFILES["limit"],
    width: Width = "bfloat16",
    **config: object,
) -> PlanSetup:
    """A tiny model on a machine of round numbers, at its limits unless told otherwise."""
    shape = ModelShape.of(describe_config(tiny_config(**config), "tiny"))
    return PlanSetup(
        shape=shape,
        hardware=hardware or machine(),
        widths=uniform(width),
        efficiency=efficiency,
        compute="bfloat16",
    )


def workload(**changes: object) -> Workload:
    """One row of 8 prompt tokens and 16 new ones in blocks of 4, two tokens a pass."""
    values: dict[str, object] = {
        "batch_size": 1,
        "prompt_tokens": 8,
        "new_tokens": 16,
        "block_size": 4,
        "tokens_per_nfe": 2.0,
    }
    return Workload(**(values | changes))  # type: ignore[arg-type]
