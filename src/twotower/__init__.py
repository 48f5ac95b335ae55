"""twotower: two-tower block diffusion language models that people can run, train and serve."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.arguments import require

if TYPE_CHECKING:
    from twotower.backends import accelerate
    from twotower.config import TwoTowerConfig
    from twotower.engine.events import (
        Completion,
        Event,
        Failed,
        Finished,
        StepTaken,
        TokensCommitted,
    )
    from twotower.engine.generate import generate, stream
    from twotower.engine.options import EngineOptions, GenerateOptions
    from twotower.lab.evaluate.likelihood import Score, score_texts
    from twotower.loading import Placement, load_model, save_model
    from twotower.model import ContextCache, ContextView, TwoTower
    from twotower.tokenizer import Tokenizer
    from twotower.train.loop import StepReport, train_model, train_steps
    from twotower.train.options import TrainOptions
    from twotower.train.prepare import PrepareOptions, prepare_data

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "ContextCache",
    "ContextView",
    "EngineOptions",
    "Event",
    "Failed",
    "Finished",
    "GenerateOptions",
    "Placement",
    "PrepareOptions",
    "Score",
    "StepReport",
    "StepTaken",
    "Tokenizer",
    "TokensCommitted",
    "TrainOptions",
    "TwoTower",
    "TwoTowerConfig",
    "accelerate",
    "generate",
    "load_model",
    "load_tokenizer",
    "prepare_data",
    "save_model",
    "score_texts",
    "stream",
    "train_model",
    "train_steps",
]

_HOMES = {
    "config": ("TwoTowerConfig",),
    "engine": (
        "Completion", "EngineOptions", "Event", "Failed", "Finished", "GenerateOptions",
        "StepTaken", "TokensCommitted", "generate", "stream",
    ),
    "backends": ("accelerate",),
    "lab.evaluate.likelihood": ("Score", "score_texts"),
    "loading": ("Placement", "load_model", "save_model"),
    "model": ("ContextCache", "ContextView", "TwoTower"),
    "tokenizer": ("Tokenizer",),
    "train.loop": ("StepReport", "train_model", "train_steps"),
    "train.options": ("TrainOptions",),
    "train.prepare": ("PrepareOptions", "prepare_data"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `twotower -h` should not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'twotower' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"twotower.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion: none is imported before it is used."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def load_tokenizer(model: "str | Path | None" = None) -> "Tokenizer":
    """The tokenizer of a checkpoint folder, hub id, GGUF file or tokenizer.json; without an
    argument of the model inside this package. ValueError (one line) where there is none.
    """
    from twotower import checkpoint, tokenizer

    if model is not None:
        require("model", model, (str, Path), "a path or hub id")
    return tokenizer.load_tokenizer(checkpoint.find_tokenizer(model or "shipped"))
