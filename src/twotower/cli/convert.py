"""`twotower convert`: a checkpoint into another layout or dtype."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from twotower.checkpoint import convert, convert_to_gguf

DType = Literal["keep", "float32", "bfloat16", "float16", "q8_0"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write a checkpoint in another layout or dtype; files beside the weights come along."""

    source: Annotated[str, tyro.conf.Positional]
    """Checkpoint folder or hub id owner/name: two towers, or a single-tower backbone."""
    target: Annotated[str, tyro.conf.Positional]
    """Folder to write (with --to gguf: the file); an existing checkpoint there is replaced when the
    new one is complete."""
    to: Literal["released", "backbone", "transformers", "gguf"] = "released"
    """released: both towers (a backbone fills both). backbone: the context tower alone.
    transformers: the context tower as transformers 5 loads it (NemotronHForCausalLM).
    gguf: the context tower and the tokenizer as one file for llama.cpp (nemotron_h)."""
    dtype: DType = "keep"
    """Of the weights written; routers stay float32. q8_0 (GGUF only): 8 bits, a scale for 32."""

    def __post_init__(self) -> None:
        if self.dtype == "q8_0" and self.to != "gguf":
            raise ValueError(f"dtype=q8_0 exists in GGUF files only, not with to={self.to}")


def run(options: ConvertOptions) -> int:
    """Convert; returns the exit status. Errors of the user arrive as ValueError."""
    if options.to == "gguf":
        precision = None if options.dtype == "keep" else options.dtype
        convert_to_gguf(options.source, options.target, precision)
    else:
        dtypes = {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }
        convert(options.source, options.target, options.to, dtypes.get(options.dtype))
    print(f"{options.target}: written in the {options.to} layout")
    return 0
