"""Ctrl-C and SIGTERM during training: finish the step, save, stop. A second signal acts at once,
but not under torchrun, which passes a terminal's Ctrl-C on a second time.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, the first signal only sets `requested`."""

    def __init__(self, is_patient: bool = False) -> None:
        """is_patient: further signals change nothing."""
        self.requested = False
        self._is_patient = is_patient
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._previous = {s: signal.signal(s, self._request) for s in _SIGNALS}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._is_patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._previous = {}

    def __exit__(self, *error: object) -> None:
        self._restore()
