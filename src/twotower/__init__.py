"""twotower: two-tower block diffusion language models that people can run, train and serve."""

from twotower.checkpoint import load_model
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
from twotower.tokenizer import Tokenizer, load_tokenizer

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
