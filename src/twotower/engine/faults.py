"""What an error means for rows: the one at fault ends with one line, the others go on."""

import logging
import traceback

import torch

from twotower.engine.events import Failed, FailureKind
from twotower.engine.filters import FilterFailed
from twotower.engine.grammar import GrammarFailed
from twotower.engine.row import Row

_log = logging.getLogger(__name__)
_MESSAGES: dict[FailureKind, str] = {
    "cancelled": "the request was cancelled",
    "deadline": "the request took longer than its deadline allows; allow more time or less text",
    "stopped": "the server is stopping; send the request again later",
    "internal": "an internal error ended this row; the log has the details",
    "memory": "there was not enough memory for this row; shorten it, or send fewer rows at once",
}


class EngineDeadError(RuntimeError):
    """Nothing can be decoded any more, whichever row it is: decoding ends."""


def failed(row: int, kind: FailureKind, error: Exception | None = None) -> Failed:
    """The last event of a row that ends for a reason that has nothing to do with its text."""
    return Failed(row=row, kind=kind, message=_MESSAGES[kind], error=error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was lacking; PyTorch on a CPU has no exception of its own for that."""
    is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_named or "can't allocate memory" in str(error)


def failure(row: Row, error: Exception) -> Failed:
    """A row's last event after an error: ours, its grammar's or filters', or for want of memory."""
    if is_out_of_memory(error):
        return failed(row.index, "memory", error)
    if not isinstance(error, FilterFailed | GrammarFailed):
        return failed(row.index, "internal", error)
    is_of_grammar = isinstance(error, GrammarFailed) and error.is_of_grammar
    kind: FailureKind = "invalid" if is_of_grammar else "internal"
    return Failed(row=row.index, kind=kind, message=str(error), error=error)


def log_failure(event: Failed) -> None:
    """Say what went wrong and where. What the error itself says may quote the prompt: only at
    level DEBUG.
    """
    if event.error is None:
        return
    places = traceback.extract_tb(event.error.__traceback__)
    trail = " > ".join(f"{place.filename}:{place.lineno} {place.name}" for place in places)
    _log.error("row %d: %s at %s", event.row, type(event.error).__name__, trail)
    _log.debug("row %d: %s", event.row, event.error)
