"""Where drafts of mode="speculative" come from, and when a row has one.

A drafter is a file with `propose`: drafts_lookup copies what the text has said before,
drafts_denoiser lets the denoiser tower write. Each row has a controller for each kind of draft,
which knows what drafts of that kind have yielded in this row.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Drafts = Literal["auto", "lookup", "denoiser"]
DrafterName = Literal["lookup", "denoiser"]


class DraftController:
    """Whether a kind of draft pays in a row, by the row's own history alone, so that rows stay
    independent.

    break_even: AR steps that a draft and its verification cost; with fewer tokens a cycle AR
    decoding is faster. weight: of the newest draft in the running mean of their tokens. pauses: how
    many cycles pass before the next trial after a failed one, and the most that they double to.
    A text that drafts badly costs one trial at the start and then one in a pause.
    """

    def __init__(self, break_even: float, weight: float, pauses: tuple[int, int]) -> None:
        self._break_even, self._weight = break_even, weight
        self._first_pause, self._longest_pause = pauses
        self._expected = 1.5 * break_even  # tokens of a cycle
        self._pause, self._next_pause = 0, self._first_pause

    @property
    def is_drafting(self) -> bool:
        """Whether the next cycle may have such a draft."""
        return self._pause == 0

    @property
    def gain(self) -> float:
        """Expected tokens of a cycle by what it costs; AR decoding has 1."""
        return self._expected / self._break_even

    def record_draft(self, accepted: int) -> None:
        """A cycle with such a draft yielded `accepted` >= 1 tokens."""
        self._expected += self._weight * (accepted - self._expected)
        if self._expected >= self._break_even:
            self._next_pause = self._first_pause
            return
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, self._longest_pause)
        self._expected = self._break_even  # after the pause one good draft is enough to go on

    def record_other(self) -> None:
        """A cycle went by without such a draft."""
        self._pause = max(0, self._pause - 1)


class Proposal(NamedTuple):
    """A draft that a row may have in this cycle."""

    drafter: DrafterName
    controller: DraftController
    tokens: Sequence[int] = ()  # what follows the known ones, where that is known already


def best(proposals: Iterator[Proposal | None]) -> Proposal | None:
    """The one of which most is expected, the first of equals; None where none may be tried."""
    possible = [p for p in proposals if p is not None and p.controller.is_drafting]
    return max(possible, key=lambda proposal: proposal.controller.gain, default=None)
