"""Decoding: prompts in, rows of tokens out, in any mode. Takes a loaded model, never a path."""

from twotower.engine.events import (
    Completion,
    Event,
    Failed,
    Finished,
    StepTaken,
    TokenLogprob,
    TokensCommitted,
)
from twotower.engine.filters import Filter
from twotower.engine.generate import generate, stream, stream_requests
from twotower.engine.grammar import Grammar
from twotower.engine.options import MODES, EngineOptions, GenerateOptions, Mode
from twotower.engine.requests import Request

__all__ = [
    "MODES",
    "Completion",
    "EngineOptions",
    "Event",
    "Failed",
    "Filter",
    "Finished",
    "GenerateOptions",
    "Grammar",
    "Mode",
    "Request",
    "StepTaken",
    "TokenLogprob",
    "TokensCommitted",
    "generate",
    "stream",
    "stream_requests",
]
