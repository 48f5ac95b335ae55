"""GGUF files with other metadata or tensors than ours: what other writers make, or a fault."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize

__all__ = ["Kind", "Tensor", "blocks", "dequantize", "quantize", "rewrite"]
Kind = gguf.GGMLQuantizationType
Value = gguf.GGUFValueType
Tensor = tuple[str, np.ndarray, Kind]  # its name, its bytes or numbers, their type
_TYPES = {bool: Value.BOOL, int: Value.UINT32, float: Value.FLOAT32, str: Value.STRING}


def rewrite(
    source: Path,
    target: Path,
    changes: Mapping[str, Any] | None = None,
    each: Callable[[Tensor], list[Tensor]] | None = None,
) -> None:
    """A copy of a file with some metadata changed, None for left out, and with what `each` makes
    of each tensor."""
    reader = gguf.GGUFReader(source)
    values = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    values |= changes or {}
    writer = gguf.GGUFWriter(target, values.pop("general.architecture"))
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, _TYPES[type(value)])
    for tensor in reader.tensors:
        own = (tensor.name, np.array(tensor.data), tensor.tensor_type)
        for name, data, form in [own] if each is None else each(own):
            writer.add_tensor(name, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(shape: tuple[int, ...], kind: Kind, seed: int) -> np.ndarray:
    """Random content of a type: any bytes are numbers, if the scales in front are finite."""
    rng = np.random.default_rng(seed)
    if kind in (Kind.F32, Kind.F16):
        plain = {Kind.F32: np.float32, Kind.F16: np.float16}[kind]
        return (0.1 * rng.standard_normal(shape)).astype(plain)
    if kind == Kind.BF16:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return values.view(torch.uint8).numpy()
    numbers, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    count = shape[0] * shape[1] // numbers
    data = rng.integers(0, 256, (count, num_bytes), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.01, (count, 2)).astype(np.float16).view(np.uint8)
    if kind.name == "MXFP4":
        data[:, 0] = rng.integers(118, 124, count)  # a power of two
    elif kind.name in ("Q2_K", "Q3_K", "Q6_K"):  # whose scales are the last
        num_scales = 4 if kind == Kind.Q2_K else 2
        data[:, -num_scales:] = scales[:, :num_scales]
    else:
        num_scales = 4 if kind.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 2
        data[:, :num_scales] = scales[:, :num_scales]
    return data.reshape(shape[0], -1)
