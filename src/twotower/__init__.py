"""twotower: two-tower block diffusion language models that people can run, train and serve."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.arguments import require

if TYPE_CHECKING:
    from twotower.backends import accelerate as accelerate
    from twotower.config import TwoTowerConfig as TwoTowerConfig
    from twotower.engine.events import Completion as Completion
    from twotower.engine.events import Event as Event
    from twotower.engine.events import Failed as Failed
    from twotower.engine.events import Finished as Finished
    from twotower.engine.events import StepTaken as StepTaken
    from twotower.engine.events import TokensCommitted as TokensCommitted
    from twotower.engine.generate import generate as generate
    from twotower.engine.generate import stream as stream
    from twotower.engine.options import EngineOptions as EngineOptions
    from twotower.engine.options import GenerateOptions as GenerateOptions
    from twotower.lab.evaluate.likelihood import Score as Score
    from twotower.lab.evaluate.likelihood import score_texts as score_texts
    from twotower.loading import Placement as Placement
    from twotower.loading import load_model as load_model
    from twotower.loading import save_model as save_model
    from twotower.model import ContextCache as ContextCache
    from twotower.model import ContextView as ContextView
    from twotower.model import TwoTower as TwoTower
    from twotower.tokenizer import Tokenizer as Tokenizer
    from twotower.train.loop import StepReport as StepReport
    from twotower.train.loop import train_model as train_model
    from twotower.train.loop import train_steps as train_steps
    from twotower.train.options import TrainOptions as TrainOptions
    from twotower.train.prepare import PrepareOptions as PrepareOptions
    from twotower.train.prepare import prepare_data as prepare_data

__version__ = "0.1.0"

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
__all__ = [*_HOME, "load_tokenizer"]


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
