"""A tiny model of every kind of layer whose rows are whole groups of 32."""

import torch

from tiny_models import fresh_model
from twotower import TwoTower
from twotower.kernels.quantised import Quantised, pack_halves
from twotower.model.precision import Scheme

SIZES: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
}
SCHEMES = {
    "int8": Scheme(weights="int8"),
    "int8-int8": Scheme(weights="int8", activations="int8"),
    "int4": Scheme(weights="int4"),
    "int4-64": Scheme(weights="int4", group_size=64),
}


def four_bits(rows: int, columns: int, group_size: int) -> Quantised:
    """A matrix as a checkpoint has it, with scales and zeros of all sizes."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(16, (rows, columns), generator=generator)
    sizes = torch.logspace(-7, 1, columns // group_size)
    scale, zero = (torch.randn(rows, len(sizes), generator=generator) * sizes for _ in range(2))
    return Quantised(pack_halves(numbers), scale.abs().bfloat16(), zero.bfloat16())


def groupable_model(dtype: torch.dtype = torch.float32, **changes: object) -> TwoTower:
    """One of one's own."""
    return fresh_model(dtype=dtype, **(SIZES | changes))
