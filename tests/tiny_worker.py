"""A worker with a tiny model, options of short rows, and a way to break passes of one row."""

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model
from tiny_options import options_of
from twotower import ContextCache, ContextView, GenerateOptions, TwoTower
from twotower.engine import (
    Completion,
    EngineOptions,
    Event,
    Failed,
    Finished,
    Ticket,
    Worker,
)

MODEL = tiny_model()
CULPRIT = 30  # a row whose context has as many tokens is the one that is broken
SECRET = "SECRET"  # what an error says of the prompt


def options(**changes: object) -> GenerateOptions:
    """Blocks of 4 tokens in 4 steps."""
    return options_of({"max_new_tokens": 6, "block_size": 4, "steps_per_block": 4}, changes)


@contextlib.contextmanager
def running(**changes: object) -> Iterator[Worker]:
    """A worker that is stopped in the end, whatever happens."""
    worker = Worker(MODEL, None, EngineOptions(**changes))  # type: ignore[arg-type]
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(0)
        assert not worker.stats().is_alive


def end_of(ticket: Ticket) -> Event:
    """The row's last event."""
    *_, last = ticket.events()
    return last


def completion_of(ticket: Ticket) -> Completion:
    """The result of a row that ends well."""
    last = end_of(ticket)
    assert isinstance(last, Finished), last
    return last.completion


def failure_of(ticket: Ticket) -> Failed:
    """The end of a row that does not."""
    last = end_of(ticket)
    assert isinstance(last, Failed), last
    return last


def wait_for(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return when it has happened; an error after `seconds`."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def _lengths(state: object) -> Tensor:
    """Tokens of each row that the state of a pass holds."""
    if isinstance(state, ContextCache):
        return state.lengths
    if isinstance(state, ContextView):
        full = torch.full((state.num_rows,), state.num_past)
        return full if state.lengths is None else state.lengths
    assert isinstance(state, Tensor)  # of prompts: as long as they are padded
    return torch.full((len(state),), state.shape[1])


def break_rows(monkeypatch: pytest.MonkeyPatch, name: str, with_nan: bool) -> None:
    """Let the method of TwoTower fail for rows of CULPRIT tokens and more: raise, or give NaN."""
    method = getattr(TwoTower, name)

    def broken(model: TwoTower, first: object, *rest: object) -> object:
        state = rest[0] if isinstance(rest[0] if rest else None, ContextView) else first
        is_culprit = _lengths(state) >= CULPRIT
        if bool(is_culprit.any()) and not with_nan:
            raise RuntimeError(f"{SECRET} {state}")
        found = method(model, first, *rest)
        if with_nan:
            found[is_culprit] = float("nan")
        return found

    monkeypatch.setattr(TwoTower, name, broken)
