"""A tiny model of every kind of layer whose rows are whole groups of 32."""

import torch

from tiny_models import fresh_model
from twotower import TwoTower
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


def groupable_model(dtype: torch.dtype = torch.float32, **changes: object) -> TwoTower:
    """One of one's own."""
    return fresh_model(dtype=dtype, **(SIZES | changes))
