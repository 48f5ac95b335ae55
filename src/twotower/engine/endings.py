"""Where a text ends before its tokens do: at a stop string, or at what a filter matches.

Both are looked for character by character: the first character that completes a match of any of
them ends the text where that match begins.
"""

from typing import Literal, NamedTuple

from twotower.engine.filters import Filter


class Ending(NamedTuple):
    """The first character that is no part of the text, and why."""

    start: int
    reason: Literal["stop", "content_filter"]


class Endings:
    """Watches one text grow. Its methods raise FilterFailed."""

    def __init__(self, stops: tuple[str, ...], filters: tuple[Filter, ...]) -> None:
        self._stops, self._filters = stops, filters
        self._num_watched = 0  # characters

    def find(self, text: str) -> Ending | None:
        """The ending that one of the characters completes which the text did not have before."""
        for end in range(self._num_watched + 1, len(text) + 1):
            self._num_watched = end
            filtered = self._filtered(text, end, is_over=False)
            stops = [end - len(s) for s in self._stops if text.endswith(s, 0, end)]
            if filtered is not None and filtered <= min(stops, default=end):
                return Ending(filtered, "content_filter")
            if stops:
                start = min(stops)
                return self.find_last(text[:start]) or Ending(start, "stop")
        return None

    def find_last(self, text: str) -> Ending | None:
        """What the filters say now that nothing follows the text."""
        start = self._filtered(text, len(text), is_over=True)
        return None if start is None else Ending(start, "content_filter")

    def num_held(self, text: str) -> int:
        """How many of the last characters a match may still begin in."""
        held = max((one.num_held for one in self._filters), default=0)
        longest = max(map(len, self._stops), default=1)
        for length in range(min(len(text), longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length + held
        return held

    def _filtered(self, text: str, end: int, is_over: bool) -> int | None:
        found = [one.find(text, end, is_over) for one in self._filters]
        return min((start for start in found if start is not None), default=None)
