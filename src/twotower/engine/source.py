"""Decoding of any number of requests, which are read as slots become free."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

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

    def make(index: int, request: Request) -> Row:
        return make_row(model, index, request, tokenizer, "the prompt")

    return Scheduler(model, SourceQueue(requests, make), engine).run()


class SourceQueue(RequestQueue):
    """Rows made of requests of a source, which is read no further than needed: again after a cycle
    where it has said None, or a moment later.
    """

    def __init__(
        self, source: Iterable[Request | None], make: Callable[[int, Request], Row]
    ) -> None:
        """make: a row of its number and request; ValueError if it cannot be decoded."""
        super().__init__()
        self._source, self._make, self._num_read = iter(source), make, 0
        self._is_exhausted = False
        self._failed: list[Failed] = []

    @property
    def is_over(self) -> bool:
        """Whether no row waits and none will come."""
        return self._is_exhausted and not self._rows and not self._failed

    def count(self, most: int) -> int:
        """How many rows wait, once up to `most` are read."""
        while len(self._rows) < most and not self._is_exhausted:
            try:
                request = next(self._source)
            except StopIteration:
                self._is_exhausted = True
                break
            if request is None:
                break
            try:
                self._rows.append(self._make(self._num_read, request))
            except ValueError as error:
                failed = Failed(row=self._num_read, kind="invalid", message=str(error))
                self._failed.append(failed)
            self._num_read += 1
        return super().count(most)

    def aborted(self, rows: Sequence[Row]) -> list[Failed]:
        """Those of the source that cannot begin."""
        ended, self._failed = self._failed, []
        return ended

    def wait(self) -> None:
        """An iterator cannot tell when it will have something: ask again a moment later."""
        if not self._is_exhausted and not self._rows:
            time.sleep(_IDLE_S)
