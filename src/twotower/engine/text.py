"""The text of a row: what it is, how much of it may be shown, where it ends.

Stop strings and filters are looked for character by character: the first character that completes
a match of any of them ends the text where that match begins.
"""

from bisect import bisect_right
from typing import Literal

from twotower.engine.filters import Filter
from twotower.tokenizer import Tokenizer


class RowText:
    """Takes tokens, gives out characters: whole ones, and none that a match could reach into."""

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...] = (), filters: tuple[Filter, ...] = ()
    ) -> None:
        self.text = ""  # all that is decoded and not cut
        self.ending: Literal["stop", "content_filter"] | None = None
        self.is_filtered = bool(filters)
        self._stops, self._filters = stops, filters
        self._stream = tokenizer.stream()
        self._num_watched = 0  # characters
        self._num_shown = 0
        self._is_over = False
        self._ends: list[int] = []  # of each token: characters until its last is complete
        self._num_open = 0  # newest tokens, whose last character is not

    def push(self, token: int) -> None:
        """Add a token; `ending` is set if a match ends the text. Raises FilterFailed."""
        self._num_open += 1
        self._add(self._stream.push([token]))

    def close(self) -> None:
        """No token will follow."""
        self._add(self._stream.flush())
        self._ends += [len(self.text)] * self._num_open
        if self.ending is None:
            self._finish()

    def show(self) -> str:
        """Characters that nothing can take back, from the first that was not shown yet."""
        end = len(self.text)
        if not self._is_over:
            end -= _longest_partial(self.text, self._stops)
            end -= max((one.num_held for one in self._filters), default=0)
        start, self._num_shown = self._num_shown, max(end, self._num_shown)
        return self.text[start : self._num_shown]

    @property
    def num_released(self) -> int:
        """How many tokens consist of shown characters only."""
        return bisect_right(self._ends, self._num_shown)

    def _add(self, piece: str) -> None:
        if not piece:
            return
        self.text += piece
        self._ends += [len(self.text)] * self._num_open
        self._num_open = 0
        if not self._stops and not self._filters:
            return
        while self.ending is None and self._num_watched < len(self.text):
            self._num_watched += 1
            self._watch(self._num_watched)

    def _watch(self, end: int) -> None:
        """Look for matches that character number `end` completes."""
        filtered = self._first_filtered(end, is_over=False)
        stops = [end - len(s) for s in self._stops if self.text.endswith(s, 0, end)]
        if filtered is not None and filtered <= min(stops, default=end):
            self._cut(filtered, "content_filter")
        elif stops:
            self._cut(min(stops), "stop")
            self._finish()

    def _first_filtered(self, end: int, is_over: bool) -> int | None:
        found = [one.find(self.text, end, is_over) for one in self._filters]
        return min((start for start in found if start is not None), default=None)

    def _finish(self) -> None:
        """Ask the filters once more, now that nothing follows the text."""
        self._is_over = True
        start = self._first_filtered(len(self.text), is_over=True)
        if start is not None:
            self._cut(start, "content_filter")

    def _cut(self, start: int, ending: Literal["stop", "content_filter"]) -> None:
        self.text, self.ending, self._is_over = self.text[:start], ending, True


def _longest_partial(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is the start of a stop string."""
    for length in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
