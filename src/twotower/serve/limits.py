"""How much one caller may ask for: requests at a time and in a minute."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from twotower.serve.errors import ApiError

_WINDOW_S = 60.0
_MANY_CALLERS = 4096  # above it, and then at every doubling, callers who are idle are forgotten


@dataclass
class _Usage:
    running: int = 0
    started: deque[float] = field(default_factory=deque)  # seconds of the clock, oldest first


class Limits:
    """Counts each caller's requests. For one thread: the server's event loop."""

    def __init__(
        self,
        concurrency: int | None,
        per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._concurrency = concurrency
        self._per_minute = per_minute
        self._clock = clock
        self._callers: dict[str, _Usage] = {}
        self._many = _MANY_CALLERS

    def enter(self, caller: str) -> None:
        """Count a request that begins; ApiError 429 when it is one too many."""
        usage, now = self._callers.setdefault(caller, _Usage()), self._clock()
        _forget_before(usage, now - _WINDOW_S)
        if self._concurrency is not None and usage.running >= self._concurrency:
            raise _refusal("key_concurrency", f"{self._concurrency} requests at a time", 1)
        if self._per_minute is not None:
            if len(usage.started) >= self._per_minute:
                wait_s = math.ceil(usage.started[0] + _WINDOW_S - now)
                raise _refusal("key_rate", f"{self._per_minute} requests a minute", max(1, wait_s))
            usage.started.append(now)
        usage.running += 1
        if len(self._callers) > self._many:
            self._forget_idle(now)

    def leave(self, caller: str) -> None:
        """The request has ended."""
        usage = self._callers.get(caller)
        assert usage is not None and usage.running > 0
        usage.running -= 1

    def _forget_idle(self, now: float) -> None:
        for usage in self._callers.values():
            _forget_before(usage, now - _WINDOW_S)
        self._callers = {c: u for c, u in self._callers.items() if u.running or u.started}
        self._many = max(_MANY_CALLERS, 2 * len(self._callers))


def _forget_before(usage: _Usage, moment: float) -> None:
    while usage.started and usage.started[0] <= moment:
        usage.started.popleft()


def _refusal(code: str, limit: str, wait_s: int) -> ApiError:
    return ApiError(
        429,
        f"your limit of {limit} is reached; try again in {wait_s} s",
        code=code,
        headers={"Retry-After": str(wait_s)},
    )
