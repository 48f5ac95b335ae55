"""Decoding: prompts in, rows of tokens out, in any mode. Takes a loaded model, never a path."""

from twotower.engine.events import Completion as Completion
from twotower.engine.events import Event as Event
from twotower.engine.events import Failed as Failed
from twotower.engine.events import Finished as Finished
from twotower.engine.events import StepTaken as StepTaken
from twotower.engine.events import TokenLogprob as TokenLogprob
from twotower.engine.events import TokensCommitted as TokensCommitted
from twotower.engine.filters import Filter as Filter
from twotower.engine.generate import generate as generate
from twotower.engine.generate import stream as stream
from twotower.engine.grammar import Grammar as Grammar
from twotower.engine.options import EngineOptions as EngineOptions
from twotower.engine.options import GenerateOptions as GenerateOptions
from twotower.engine.request import Request as Request
from twotower.engine.request import defaults_of as defaults_of
from twotower.engine.resolved import MODES as MODES
from twotower.engine.resolved import Mode as Mode
from twotower.engine.resolved import ResolvedOptions as ResolvedOptions
from twotower.engine.resolved import resolve_options as resolve_options
from twotower.engine.shared_queue import Stopped as Stopped
from twotower.engine.source import stream_requests as stream_requests
from twotower.engine.worker import QueueFull as QueueFull
from twotower.engine.worker import Ticket as Ticket
from twotower.engine.worker import Worker as Worker
from twotower.engine.worker import WorkerStats as WorkerStats
