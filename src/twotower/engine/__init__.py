"""Decoding: prompts in, rows of tokens out, in any mode. Takes a loaded model, never a path."""

from twotower.engine.events import Completion, Event, Finished, StepTaken, TokensCommitted
from twotower.engine.generate import generate, stream
from twotower.engine.options import MODES, GenerateOptions, Mode

__all__ = [
    "MODES",
    "Completion",
    "Event",
    "Finished",
    "GenerateOptions",
    "Mode",
    "StepTaken",
    "TokensCommitted",
    "generate",
    "stream",
]
