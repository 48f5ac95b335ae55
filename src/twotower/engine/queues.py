"""Whose work runs where: one queue, or one for each tower.

In two queues the rows are dealt to two lanes; while one lane's blocks are in the denoiser, the
other's are in the context tower. A lane is in one queue at a time, so nothing of it needs a lock.
"""

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from twotower.engine.events import Event
from twotower.engine.options import EngineOptions
from twotower.engine.prefix_cache import PrefixCache
from twotower.engine.scheduler import Lane, Line
from twotower.model import TwoTower


def run(
    model: TwoTower, line: Line, options: EngineOptions, prefixes: PrefixCache | None = None
) -> Iterator[Event]:
    """Decode all rows of the line, in as many queues as the options say.

    prefixes: contexts of earlier runs; by default, of this one alone, if the options want any.
    """
    if prefixes is None and options.prefix_cache_bytes:
        prefixes = PrefixCache(model, options.prefix_cache_bytes)
    is_apart = model.denoiser_device != model.context_device
    if options.queues == "two" or (options.queues == "auto" and is_apart):
        lanes = [Lane(model, prefixes), Lane(model, prefixes)]
        return run_side_by_side(lanes, line, options.max_rows)
    return run_in_turn(Lane(model, prefixes), line, options.max_rows)


def run_in_turn(lane: Lane, line: Line, max_rows: int) -> Iterator[Event]:
    """One queue: denoiser and context work follow one another, in the caller's thread."""
    while True:
        yield from lane.leave(line)
        yield from lane.take(line, max_rows - lane.num_rows, is_alone=True)
        yield from lane.start()
        if lane.num_rows:
            yield from lane.propose()
            yield from lane.settle()
        elif line.is_over:
            return
        else:
            line.wait()


class _Done(NamedTuple):
    """A lane has left a queue."""

    lane: Lane
    next_job: Callable[[Lane], Iterator[Event]] | None  # None: its cycle is complete
    future: "Future[None]"


def run_side_by_side(lanes: list[Lane], line: Line, max_rows: int) -> Iterator[Event]:
    """Two queues, a thread each, and two lanes that change places between them."""
    happened: queue.SimpleQueue[Event | _Done] = queue.SimpleQueue()
    busy: list[Lane] = []
    with ThreadPoolExecutor(1) as denoiser, ThreadPoolExecutor(1) as context:

        def submit(lane: Lane, job: Callable[[Lane], Iterator[Event]]) -> None:
            pool, following = (denoiser, Lane.settle) if job is Lane.propose else (context, None)
            if job is Lane.start:
                following = Lane.propose
            future = pool.submit(_work, job(lane), happened)
            future.add_done_callback(lambda done: happened.put(_Done(lane, following, done)))

        while True:
            for lane in lanes:
                if lane not in busy:
                    yield from lane.leave(line)
                    yield from lane.take(line, _share(lane, lanes, line, max_rows), not busy)
                    if lane.num_rows:
                        busy.append(lane)
                        submit(lane, Lane.start)
            if not busy:
                if line.is_over:
                    return
                line.wait()
                continue
            event = happened.get()
            if not isinstance(event, _Done):
                yield event
                continue
            event.future.result()
            if event.next_job and event.lane.num_rows:
                submit(event.lane, event.next_job)
            else:
                busy.remove(event.lane)


def _share(lane: Lane, lanes: list[Lane], line: Line, max_rows: int) -> int:
    """How many rows the lane may take so that both end up with as many."""
    present = sum(one.num_rows for one in lanes)
    waiting = line.look(max(0, max_rows - present))
    return max(0, min(waiting, -(-(present + waiting) // 2) - lane.num_rows))


def _work(events: Iterator[Event], happened: "queue.SimpleQueue[Event | _Done]") -> None:
    for event in events:
        happened.put(event)
