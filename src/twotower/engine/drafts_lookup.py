"""Drafts that cost nothing: what followed the newest tokens when they last occurred in the text.

Known as prompt lookup or n-gram speculation. Source: https://github.com/apoorvumang/prompt-lookup-decoding
"""

from bisect import bisect_right
from collections.abc import Sequence

from twotower.engine.batch import Batch
from twotower.engine.drafts import DraftController, Proposal
from twotower.engine.request import Row

LEAST_MATCH, MOST_MATCH = 2, 16  # tokens that must have occurred before, and that are compared
MOST_TRIED = 32  # occurrences of the last two tokens that are compared, the newest first
# The longer a match, the more of what follows is right. Matches from so many tokens on are of one
# kind, and have drafts of so many, which with the newest token fill 4, 8 and 16 places of a pass.
_KINDS, _DRAFTS = (LEAST_MATCH, 3, 5, 8), (3, 3, 7, 15)
_WEIGHT, _PAUSES = 0.15, (8, 96)


class LookupIndex:
    """Where each pair of tokens of one text has occurred; grows with the text."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._newest: dict[tuple[int, int], int] = {}  # pair: where the token after it stands
        self._earlier: list[int] = []  # of each token, where the one after the same pair stood; -1

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        text = self._text
        for token in tokens:
            at = len(text)
            pair = (text[at - 2], text[at - 1]) if at >= 2 else None
            self._earlier.append(-1 if pair is None else self._newest.get(pair, -1))
            if pair is not None:
                self._newest[pair] = at
            text.append(token)

    @property
    def num_tokens(self) -> int:
        """Tokens of the text so far."""
        return len(self._text)

    def find(self, after: Sequence[int], most: int) -> tuple[int, list[int]]:
        """How many tokens at the end of the text and `after` occurred before, and up to `most` that
        followed there. The longest match, the newest of equals; (0, []) below LEAST_MATCH.

        What followed may run into the end of the text: then it repeats, as the text would.
        """
        end = [*self._text[-MOST_MATCH:], *after][-MOST_MATCH:]
        length, place = 0, -1
        at = self._newest.get((end[-2], end[-1]), -1) if len(end) >= LEAST_MATCH else -1
        for _ in range(MOST_TRIED):
            if at < 0 or length == len(end):
                break
            if (found := self._num_equal(end, at)) > length:
                length, place = found, at
            at = self._earlier[at]
        if length == 0:
            return 0, []
        text = self._text[place : place + most]
        if len(text) < most:  # all that there is
            text += after
        return length, [text[i % len(text)] for i in range(most)]

    def _num_equal(self, end: Sequence[int], at: int) -> int:
        """How many tokens before place `at` are those at the end."""
        count = 0
        while count < min(len(end), at) and self._text[at - 1 - count] == end[-1 - count]:
            count += 1
        return count


def propose(row: Row, batch: Batch, known: Sequence[int], room: int) -> Proposal | None:
    """The draft of a row's own text behind its tokens and the known ones, at most `room` long."""
    if row.options.drafts == "denoiser":
        return None
    if row.lookup is None:
        row.lookup = LookupIndex()
    done = row.lookup.num_tokens
    row.lookup.extend(row.between(done, len(row.prompt) + len(row.tokens)))
    length, tokens = row.lookup.find(known, room)
    if length == 0:
        return None
    kind = bisect_right(_KINDS, length) - 1
    name = f"lookup {_KINDS[kind]}"
    if name not in row.controllers:
        row.controllers[name] = DraftController(_WEIGHT, _PAUSES)
    return Proposal("lookup", row.controllers[name], tokens[: _DRAFTS[kind]])
