"""Bytes of a model's weights and of its cache in each precision, by configuration alone."""

import torch

from twotower.checkpoint import names
from twotower.checkpoint.empty import Towers, build_empty
from twotower.checkpoint.files import DTYPES
from twotower.config import TwoTowerConfig
from twotower.model.precision import Scheme


def weight_bytes(config: TwoTowerConfig, towers: Towers) -> dict[str, int]:
    """Bytes of all weights by precision; quantised ones beside a bfloat16 rest."""
    kinds: dict[str, tuple[torch.dtype, Scheme | None]] = {
        "float32": (torch.float32, None),
        "bfloat16": (torch.bfloat16, None),
        "int8": (torch.bfloat16, Scheme(weights="int8")),
        "int4": (torch.bfloat16, Scheme(weights="int4")),
    }
    sizes = {}
    for kind, (dtype, scheme) in kinds.items():
        model = build_empty(config, towers, scheme)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        sizes[kind] = sum(
            tensor.numel() * (tensor.dtype if names.keeps_dtype(name) else dtype).itemsize
            for name, tensor in tensors.items()
        )
    return sizes


def kv_bytes_per_token(config: TwoTowerConfig) -> dict[str, int]:
    """Bytes that one token of a row adds to the context cache, by dtype."""
    return _by_dtype(config.context.kv_elements, 0)


def state_bytes_per_row(config: TwoTowerConfig) -> dict[str, int]:
    """Bytes of one row's Mamba states, by dtype: SSM states are always float32."""
    return _by_dtype(config.context.conv_elements, config.context.ssm_elements)


def _by_dtype(elements: int, in_float32: int) -> dict[str, int]:
    """Bytes of `elements` in each dtype plus `in_float32` elements that stay float32."""
    return {
        str(dtype).removeprefix("torch."): elements * dtype.itemsize + 4 * in_float32
        for dtype in (DTYPES["F32"], DTYPES["BF16"])
    }
