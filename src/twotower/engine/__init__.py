"""Decoding: prompts in, rows of tokens out, in any mode. Takes a loaded model, never a path."""

from twotower.engine.events import (
    Completion,
    Event,
    Failed,
    FailureKind,
    Finished,
    StepTaken,
    TokenLogprob,
    TokensCommitted,
)
from twotower.engine.filters import Filter
from twotower.engine.generate import generate, stream
from twotower.engine.grammar import Grammar
from twotower.engine.options import EngineOptions, GenerateOptions
from twotower.engine.request import Request, defaults_of
from twotower.engine.resolved import MODES, Mode, ResolvedOptions, resolve_options
from twotower.engine.shared_queue import Stopped
from twotower.engine.source import stream_requests
from twotower.engine.worker import QueueFull, Ticket, Worker, WorkerStats

__all__ = [
    "MODES",
    "Completion",
    "EngineOptions",
    "Event",
    "Failed",
    "FailureKind",
    "Filter",
    "Finished",
    "GenerateOptions",
    "Grammar",
    "Mode",
    "QueueFull",
    "Request",
    "ResolvedOptions",
    "StepTaken",
    "Stopped",
    "Ticket",
    "TokenLogprob",
    "TokensCommitted",
    "Worker",
    "WorkerStats",
    "defaults_of",
    "generate",
    "resolve_options",
    "stream",
    "stream_requests",
]
