"""Decoding of any number of requests, which are read as slots become free."""

import time
from collections.abc import Iterable, Iterator, Sequence

from twotower.engine.events import Event, Failed
from twotower.engine.options import EngineOptions
from twotower.engine.request import Request, checked_engine, make_row
from twotower.engine.request_queue import RequestQueue
from twotower.engine.row import Row
from twotower.engine.scheduler import Scheduler
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

_IDLE_S = 0.01  # between two questions to a source that has nothing at present


def stream_requests(
    model: TwoTower,
    requests: Iterable[Request | None],
    tokenizer: Tokenizer | None = None,
    engine: EngineOptions | None = None,
) -> Iterator[Event]:
    """`stream` for any number of requests, read as slots become free; rows are their numbers.

    None in place of a request means nothing at present: it is asked again after a cycle. A request
    that cannot be decoded yields Failed and does not end the others.
    """
    engine = checked_engine(model, tokenizer, engine)
    queue = SourceQueue(_rows_or_failures(model, requests, tokenizer))
    return Scheduler(model, queue, engine).run()


class SourceQueue(RequestQueue):
    """Rows of a source, which is read no further than needed.

    None means nothing at present; the source is asked again after a cycle, or a moment later.
    """

    def __init__(self, source: Iterable[Row | Failed | None]) -> None:
        super().__init__()
        self._source, self._is_exhausted = iter(source), False
        self._failed: list[Failed] = []

    @property
    def is_over(self) -> bool:
        """Whether no row waits and none will come."""
        return self._is_exhausted and not self._rows and not self._failed

    def count(self, most: int) -> int:
        """How many rows wait, once up to `most` are read."""
        while len(self._rows) < most and not self._is_exhausted:
            try:
                row = next(self._source)
            except StopIteration:
                self._is_exhausted = True
                break
            if row is None:
                break
            if isinstance(row, Failed):
                self._failed.append(row)
            else:
                self._rows.append(row)
        return super().count(most)

    def aborted(self, rows: Sequence[Row]) -> list[Failed]:
        """Those of the source that cannot begin."""
        ended, self._failed = self._failed, []
        return ended

    def wait(self) -> None:
        """An iterator cannot tell when it will have something: ask again a moment later."""
        if not self._is_exhausted and not self._rows:
            time.sleep(_IDLE_S)


def _rows_or_failures(
    model: TwoTower, requests: Iterable[Request | None], tokenizer: Tokenizer | None
) -> Iterator[Row | Failed | None]:
    index = 0
    for request in requests:
        if request is None:
            yield None
            continue
        try:
            row: Row | Failed = make_row(model, index, request, tokenizer, "the prompt")
        except ValueError as error:
            row = Failed(row=index, kind="invalid", message=str(error))
        yield row
        index += 1
