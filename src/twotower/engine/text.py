"""The text of a row, made of its tokens: what it is, and how much of it may be shown."""

from bisect import bisect_right
from typing import Literal

from twotower.engine.endings import Ending, Endings
from twotower.engine.filters import Filter
from twotower.tokenizer import Tokenizer


class RowText:
    """Takes tokens, gives out characters: whole ones, and none that an ending could reach into.
    Without a tokenizer there are none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        stops: tuple[str, ...] = (),
        filters: tuple[Filter, ...] = (),
    ) -> None:
        self.text = ""  # all that is decoded and not cut
        self.ending: Literal["stop", "content_filter"] | None = None
        self.is_filtered = bool(filters)  # nobody may see what they have not
        self.stream = None if tokenizer is None else tokenizer.stream()
        self._endings = Endings(stops, filters) if stops or filters else None
        self._num_shown = 0
        self._is_over = False
        self._ends: list[int] = []  # of each token: characters until its last is complete
        self._num_open = 0  # newest tokens, whose last character is not

    def push(self, token: int, is_last: bool) -> None:
        """Add a token, behind which none follows if it is the last; `ending` is set if a match ends
        the text. Raises FilterFailed.
        """
        if self.stream is None:
            return
        self._num_open += 1
        self._add(self.stream.push([token]))
        if is_last:
            self._add(self.stream.flush())
            self._ends += [len(self.text)] * self._num_open
            self._is_over = True
            if self._endings is not None and self.ending is None:
                self._end(self._endings.find_last(self.text))

    def show(self) -> str:
        """Characters that nothing can take back, from the first that was not shown yet."""
        end = len(self.text)
        if self._endings is not None and not self._is_over:
            end -= self._endings.num_held(self.text)
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
        if self._endings is not None and self.ending is None:
            self._end(self._endings.find(self.text))

    def _end(self, ending: Ending | None) -> None:
        if ending is not None:
            self.text, self.ending, self._is_over = self.text[: ending.start], ending.reason, True
