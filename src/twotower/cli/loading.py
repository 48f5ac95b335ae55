"""A model with what decoding needs beside it, from a path or from inside the package."""

import atexit
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from twotower.backends import BackendName, Quantization, accelerate
from twotower.checkpoint import ExpertsIn, generation_defaults, load_model, resolve
from twotower.checkpoint.empty import Towers
from twotower.engine import GenerateOptions, resolve_options
from twotower.model import TwoTower
from twotower.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

DType = Literal["float32", "bfloat16", "float16"]
START_TIMEOUT_S = 300.0  # until both ranks are there; the first import of torch may take long
PEER_TIMEOUT_S = 30.0  # of silence, from then on


@dataclass(frozen=True, kw_only=True)
class Placement:
    """In which precision and on which devices a model is to be."""

    dtype: DType = "float32"
    """Precision that the weights are loaded in and computed with."""
    context_device: str = "cpu"
    """Where the context tower is: cpu, cuda, cuda:1 ..."""
    denoiser_device: str = "cpu"
    """Where the denoiser tower is; peer: the other of two processes that torchrun started, on this
    host or another."""
    backend: BackendName = "auto"
    """What runs forward passes. eager: plain PyTorch, every model and device. native: C++, compiled
    on first use, for float32 models without experts on a CPU. auto: native if it runs the model,
    else eager."""
    quantization: Quantization = "none"
    """int8: round the weights of projections and heads to int8 at load, for the native backend.
    none: as the checkpoint has them."""
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
    mode = resolve_options(options, generation_defaults(folder)).mode
    has_tokenizer = (folder / TOKENIZER_FILE).exists()
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    if placement.denoiser_device == "peer":
        model = _load_split(folder, placement)
    else:
        towers: Towers = "context" if mode == "ar" else "both"
        model = _load_towers(folder, placement, towers, placement.denoiser_device)
    return Loaded(name="shipped" if path is None else path, model=model, tokenizer=tokenizer)


def _load_towers(
    folder: Path, placement: Placement, towers: Towers, denoiser_device: str
) -> TwoTower:
    model = load_model(
        folder,
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            placement.dtype
        ],
        context_device=placement.context_device,
        denoiser_device=denoiser_device,
        towers=towers,
        experts=placement.experts,
    )
    return accelerate(model, placement.backend, placement.quantization)


def _load_split(folder: Path, placement: Placement) -> TwoTower:
    """The context rank's model. In the denoiser rank this fills blocks and then ends the process:
    the command is the context rank's to run.
    """
    from twotower.hosts import Link, SplitTwoTower, join_ranks, serve_blocks

    rank = join_ranks(START_TIMEOUT_S)
    link = Link(1 - rank, PEER_TIMEOUT_S)
    if rank == 1:
        serve_blocks(_load_towers(folder, placement, "denoiser", placement.context_device), link)
        raise SystemExit(0)
    model = SplitTwoTower(_load_towers(folder, placement, "context", "cpu"), link)
    atexit.register(model.close)
    return model
