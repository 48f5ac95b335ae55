"""What happens when a pass fails: its rows are tried one by one, so that only the culprit ends."""

import logging
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from twotower.engine.events import Event, Failed
from twotower.engine.filters import FilterFailed
from twotower.engine.grammar import GrammarFailed
from twotower.engine.row import Row
from twotower.model import ContextCache

_log = logging.getLogger(__name__)
_INTERNAL = "an internal error ended this row; the log has the details"
_MEMORY = "there was not enough memory for this row; shorten it, or send fewer rows at once"
Result = TypeVar("Result")
# Gets the places of the rows to work on: all of them, or one.
Work = Callable[[Sequence[int]], Generator[Event, None, Result]]


class HopelessError(RuntimeError):
    """Nothing can be decoded any more, whichever row it is: decoding ends."""


@dataclass(frozen=True)
class _Before:
    """What a row is taken back to before it is tried again."""

    nfe: int
    context_forwards: int
    num_commits: int
    generator: Tensor
    noise_ahead: list[Tensor]
    pace: dict[str, object]

    @classmethod
    def of(cls, row: Row) -> "_Before":
        return cls(
            row.nfe,
            row.context_forwards,
            row.num_commits,
            row.generator.get_state(),
            list(row.noise_ahead),
            dict(vars(row.pace)),
        )

    def restore(self, row: Row) -> None:
        row.nfe, row.context_forwards = self.nfe, self.context_forwards
        row.generator.set_state(self.generator)
        row.noise_ahead = list(self.noise_ahead)
        vars(row.pace).update(self.pace)


def attempt(
    rows: Sequence[Row], work: Work[Result], cache: ContextCache | None = None
) -> Generator[Event, None, list[Result]]:
    """Work on all rows together, or, if that fails, on each alone; the results of what succeeded.

    A row whose own work fails ends with Failed. So do all where the failure came too late to try
    again: when rows had committed tokens, or the cache that they share had changed. Steps of a
    second try are told again.
    """
    before = [_Before.of(row) for row in rows]
    lengths = None if cache is None else cache.lengths
    try:
        return [(yield from work(range(len(rows))))]
    except HopelessError:
        raise
    except Exception as error:
        unended = [row for row in rows if not row.is_finished]
        committed = any(b.num_commits != r.num_commits for b, r in zip(before, rows, strict=True))
        if committed or len(rows) == 1 or (cache is not None and cache.lengths is not lengths):
            yield from [failure(row, error) for row in unended]
            return []
        _log.info("a pass of %d rows failed (%s): one by one", len(rows), type(error).__name__)
    for row, saved in zip(rows, before, strict=True):
        saved.restore(row)
    return (yield from _one_by_one(rows, work))


def _one_by_one(rows: Sequence[Row], work: Work[Result]) -> Generator[Event, None, list[Result]]:
    results: list[Result] = []
    for place, row in enumerate(rows):
        try:
            results.append((yield from work([place])))
        except HopelessError:
            raise
        except Exception as error:
            yield failure(row, error)
    return results


def failure(row: Row, error: Exception) -> Failed:
    """A row's last event after an error of ours, or for want of memory."""
    if _is_of_memory(error):
        return Failed(row=row.index, kind="memory", message=_MEMORY, error=error)
    if isinstance(error, GrammarFailed) and error.is_of_grammar:
        return Failed(row=row.index, kind="invalid", message=str(error), error=error)
    if isinstance(error, FilterFailed | GrammarFailed):
        return Failed(row=row.index, kind="internal", message=str(error), error=error)
    return internal_failure(row.index, error)


def internal_failure(index: int, error: Exception) -> Failed:
    """The last event of the row `index` after an error of ours."""
    return Failed(row=index, kind="internal", message=_INTERNAL, error=error)


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


def _is_of_memory(error: Exception) -> bool:
    """PyTorch on a CPU has no exception of its own for it."""
    is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_named or "can't allocate memory" in str(error)
