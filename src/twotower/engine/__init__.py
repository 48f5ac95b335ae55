"""Decoding: prompts in, rows of tokens out, in any mode. Takes a loaded model, never a path."""

from twotower.engine.events import Completion, Event, Failed, Finished, StepTaken, TokensCommitted
from twotower.engine.generate import MAX_ROWS, generate, stream, stream_requests
from twotower.engine.options import MODES, GenerateOptions, Mode
from twotower.engine.requests import Request

__all__ = [
    "MAX_ROWS",
    "MODES",
    "Completion",
    "Event",
    "Failed",
    "Finished",
    "GenerateOptions",
    "Mode",
    "Request",
    "StepTaken",
    "TokensCommitted",
    "generate",
    "stream",
    "stream_requests",
]
