"""`twotower convert`: a checkpoint into another layout or dtype."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from twotower.checkpoint import convert, convert_to_gguf
from twotower.model.precision import Scheme

DType = Literal["keep", "float32", "bfloat16", "float16", "q8_0", "q4_0"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write a checkpoint in another layout or dtype; files beside the weights are copied."""

    source: Annotated[str, tyro.conf.Positional]
    """Checkpoint folder, GGUF file, hub id owner/name, or shipped: two towers, or a single-tower
    backbone."""
    target: Annotated[str, tyro.conf.Positional]
    """Folder to write (with --to gguf: the file); an existing checkpoint there is replaced when the
    new one is complete."""
    to: Literal["released", "backbone", "transformers", "gguf"] = "released"
    """released: both towers (a backbone fills both). backbone: the context tower alone.
    transformers: the context tower as transformers 5 loads it. gguf: the context tower and the
    tokenizer as one file for llama.cpp."""
    dtype: DType = "keep"
    """Precision of the written weights; routers stay float32. keep: as they are. q8_0, q4_0 (GGUF
    only): 8 or 4 bits, a scale for each 32 weights; with q4_0 embeddings and head have 8 bits."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """int8, int4: quantise experts and projections, and heads to 8 bits; all else keeps its dtype.
    Needs: pip install '.[quant]'."""
    group_size: int | None = None
    """int4: weights that share a scale: 32, 64 or 128. Default: 32."""
    activations: Literal["int8"] | None = None
    """int8: quantise the inputs of int8 matrices too: faster and less exact."""

    def __post_init__(self) -> None:
        if self.to != "gguf" and self.target.lower().endswith(".gguf"):
            raise ValueError(
                f"to={self.to} writes a folder, and {self.target} is named like a GGUF file; "
                "give --to gguf, or another name"
            )
        if self.dtype in ("q8_0", "q4_0") and self.to != "gguf":
            raise ValueError(f"dtype={self.dtype} exists in GGUF files only, not with to={self.to}")
        if self.scheme is not None and self.to not in ("released", "backbone"):
            raise ValueError(
                f"quantization={self.quantization} needs to=released or backbone, not {self.to}"
            )

    @property
    def scheme(self) -> Scheme | None:
        """How to quantise; None: not at all. ValueError for what does not go together."""
        if self.quantization == "none":
            for name, bits in (("group_size", "int4"), ("activations", "int8")):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: no effect without quantization={bits}; add it")
            return None
        return Scheme(
            weights=self.quantization, group_size=self.group_size, activations=self.activations
        )


def run(options: ConvertOptions) -> int:
    """Convert; returns the exit status. Errors of the user arrive as ValueError."""
    if options.to == "gguf":
        precision = None if options.dtype == "keep" else options.dtype
        convert_to_gguf(options.source, options.target, precision)
    else:
        dtype = None if options.dtype == "keep" else getattr(torch, options.dtype)
        convert(options.source, options.target, options.to, dtype, options.scheme)
    ending = "" if options.scheme is None else f" with {options.quantization} weights"
    print(f"{options.target}: written in the {options.to} layout{ending}")
    return 0
