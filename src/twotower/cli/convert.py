"""`twotower convert`: a checkpoint into another layout or dtype."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from twotower.checkpoint import convert

DType = Literal["keep", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write a checkpoint in another layout or dtype; files beside the weights come along."""

    source: Annotated[str, tyro.conf.Positional]
    """Checkpoint folder or hub id owner/name: two towers, or a single-tower backbone."""
    target: Annotated[str, tyro.conf.Positional]
    """Folder to write; an existing checkpoint there is replaced when the new one is complete."""
    to: Literal["released", "backbone", "transformers"] = "released"
    """released: both towers (a backbone fills both). backbone: the context tower alone.
    transformers: the context tower as transformers 5 loads it (NemotronHForCausalLM)."""
    dtype: DType = "keep"
    """Of the weights written; routers stay float32."""


def run(options: ConvertOptions) -> int:
    """Convert; returns the exit status. Errors of the user arrive as ValueError."""
    dtype: torch.dtype | None = None
    if options.dtype != "keep":
        dtype = {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[options.dtype]
    convert(options.source, options.target, options.to, dtype)
    print(f"{options.target}: written in the {options.to} layout")
    return 0
