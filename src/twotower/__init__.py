"""twotower: two-tower block diffusion language models that people can run, train and serve."""

from pathlib import Path

from twotower import tokenizer as _tokenizer
from twotower.checkpoint import load_model, resolve
from twotower.config import ModelConfig
from twotower.engine import (
    Completion,
    Event,
    Finished,
    GenerateOptions,
    StepTaken,
    TokensCommitted,
    generate,
    stream,
)
from twotower.model import ContextCache, ContextView, TwoTower
from twotower.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "ContextCache",
    "ContextView",
    "Event",
    "Finished",
    "GenerateOptions",
    "ModelConfig",
    "StepTaken",
    "Tokenizer",
    "TokensCommitted",
    "TwoTower",
    "generate",
    "load_model",
    "load_tokenizer",
    "stream",
]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder or hub id, or a tokenizer.json; ValueError (one line)."""
    return _tokenizer.load_tokenizer(path if Path(path).is_file() else resolve(path))
