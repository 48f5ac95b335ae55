"""A model with what decoding needs beside it, from a path or from inside the package."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from twotower.checkpoint import ExpertsIn, generation_defaults, load_model, resolve
from twotower.engine import GenerateOptions
from twotower.engine.accelerate import Executor, Weights, accelerate
from twotower.model import TwoTower
from twotower.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """In which precision and on which devices a model is to be."""

    dtype: DType = "float32"
    context_device: str = "cpu"
    denoiser_device: str = "cpu"
    executor: Executor = "auto"
    """native: passes in C++, compiled on first use (float32, CPU, no experts). eager: plain
    PyTorch. auto: native where it can be."""
    weights: Weights = "loaded"
    """int8: native passes with projections rounded to int8, made from the loaded weights."""
    experts: ExpertsIn = "memory"
    """mapped: leave routed experts in their files and read those that are chosen, for towers larger
    than memory; slow where the disk is."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model, its tokenizer (None if it has none), and how it was named."""

    name: str
    model: TwoTower
    tokenizer: Tokenizer | None


def shipped_model() -> Path:
    """Folder of the model inside the package; ValueError (one line) if there is none."""
    folder = Path(str(resources.files("twotower") / "assets"))
    if not (folder / "config.json").is_file():
        raise ValueError("this installation has no model inside; give one with --model PATH")
    return folder


def load(path: str | None, options: GenerateOptions, placement: Placement) -> Loaded:
    """The model at `path` (the shipped one when None), with the towers that `options` need.

    AR decoding loads the context tower alone. ValueError (one line) for anything unusable.
    """
    folder = shipped_model() if path is None else resolve(path)
    mode = options.with_defaults(generation_defaults(folder)).mode
    model = load_model(
        folder,
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            placement.dtype
        ],
        context_device=placement.context_device,
        denoiser_device=placement.denoiser_device,
        towers="context" if mode == "ar" else "both",
        experts=placement.experts,
    )
    has_tokenizer = (folder / TOKENIZER_FILE).exists()
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    return Loaded(
        name="shipped" if path is None else path,
        model=accelerate(model, placement.executor, placement.weights),
        tokenizer=tokenizer,
    )
