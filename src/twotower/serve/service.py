"""What the routes share, and how the worker behind them is kept alive and brought to an end."""

import asyncio
import logging
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

from twotower.engine import Filter, Worker
from twotower.serve.metrics import Metrics
from twotower.serve.options import ServeOptions
from twotower.serve.served import Served

_log = logging.getLogger("twotower.serve")
_GRAMMARS_AT_A_TIME = 2
_WATCH_S = 0.25  # how often the worker's thread is looked at


@dataclass
class Service:
    """A worker with its options, its model's description and its figures."""

    worker: Worker
    options: ServeOptions
    served: Served
    metrics: Metrics
    filters: tuple[Filter, ...]
    # Of their own, so that a schema made to be slow keeps no request waiting that has none.
    grammar_threads: Executor = field(
        default_factory=lambda: ThreadPoolExecutor(_GRAMMARS_AT_A_TIME, "twotower-grammar")
    )
    is_stopping: bool = field(default=False)

    @property
    def state(self) -> str:
        """Whether a request would be decoded now: ready, or why not; failed is for good."""
        if self.is_stopping:
            return "stopping"
        if self.worker.is_dead:
            return "failed"
        return "ready" if self.worker.stats().is_alive else "restarting"

    async def stop(self) -> None:
        """Take no more requests; finish or tell every row; return when that is done."""
        if not self.is_stopping:
            self.is_stopping = True
            await asyncio.to_thread(self.worker.stop, self.options.grace_s)

    async def keep_alive(self) -> None:
        """Start the worker again whenever its thread has died; its rows were told."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if self.state == "restarting":
                _log.error("the decoding thread has died; it is started again")
                self.metrics.restarts.inc()
                self.worker.start()
