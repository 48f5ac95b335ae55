"""Where drafts of mode="speculative" come from, and when a row has one.

A drafter is a file with `propose`: drafts_lookup copies what the text has said before,
drafts_denoiser lets the denoiser tower write. Each row has a controller of the denoiser's
drafts, which knows what they have yielded in this row.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from twotower.model.backend import PassCosts

Drafts = Literal["auto", "lookup", "denoiser"]
DrafterName = Literal["lookup", "denoiser"]


class DraftController:
    """Whether the denoiser's drafts pay in a row, by the row's own history alone, so that rows stay
    independent.

    The gain of a draft: tokens of its cycle by AR steps that they cost; AR decoding has 1. weight:
    of the newest in the running mean, and more where few were seen. pauses: how many cycles pass
    before the next trial after a failed one, and the most that they double to. A text that drafts
    badly costs one trial at the start and then one in a pause.
    """

    def __init__(self, weight: float, pauses: tuple[int, int]) -> None:
        self.gain = 1.5  # expected
        self.num_drafts = 0
        self._weight, (self._first_pause, self._longest_pause) = weight, pauses
        self._pause, self._next_pause = 0, self._first_pause

    @property
    def is_drafting(self) -> bool:
        """Whether the next cycle may have such a draft."""
        return self._pause == 0

    def record_draft(self, gain: float, num_waited: float = 0.0) -> None:
        """A cycle had such a draft, for which so many other rows waited: a trial that cost them as
        much comes as much less often.
        """
        self.num_drafts += 1
        self.gain += max(self._weight, 1 / (1 + self.num_drafts)) * (gain - self.gain)
        if self.gain >= 1:
            self._next_pause = self._first_pause
            return
        self._pause = round(self._next_pause * (1 + num_waited))
        self._next_pause = min(2 * self._next_pause, self._longest_pause)
        self.gain = 1.0  # after the pause one good draft is enough to go on

    def record_other(self) -> None:
        """A cycle went by without such a draft."""
        self._pause = max(0, self._pause - 1)


class Proposal(NamedTuple):
    """A draft that a row may have in this cycle."""

    drafter: DrafterName
    gain: float  # expected: tokens of the cycle by AR steps that they cost
    tokens: Sequence[int] = ()  # what follows the known ones, where that is known already
    parents: Sequence[int] = ()  # what each follows, by index: 0 is the newest token
    cost: float = 0.0  # AR steps that it took to write it


def pass_cost(costs: PassCosts, num_tokens: int, num_rows: int = 1, num_waiting: int = 0) -> float:
    """AR steps that a pass over num_tokens of each of num_rows costs, where so many other rows wait
    for it: an AR step is of all of them.
    """
    every = num_rows + num_waiting
    return _cost(costs, num_tokens * num_rows, num_rows) / _cost(costs, every, every)


def _cost(costs: PassCosts, num_tokens: int, num_rows: int) -> float:
    """AR steps of one row alone."""
    rows = costs.row * (num_rows - 1)
    for most, cost in costs.tokens.items():
        if num_tokens <= most:
            return cost + rows
    return cost * num_tokens / most + rows


def best_length(
    expected: Sequence[float], costs: Sequence[float], writing: float = 0.0
) -> tuple[int, float]:
    """How many tokens of a draft to verify, and what is gained. expected: tokens of the cycle with
    none, 1, 2 ... of them; costs: of a pass over those, in AR steps; writing: of the draft.
    """
    gains = [tokens / (writing + cost) for tokens, cost in zip(expected, costs, strict=True)]
    count = max(range(len(gains)), key=gains.__getitem__)
    return count, gains[count]


def best(proposals: Iterator[Proposal | None]) -> Proposal | None:
    """The one of which most is expected, the first of equals; None where none may be tried."""
    possible = [proposal for proposal in proposals if proposal is not None]
    return max(possible, key=lambda proposal: proposal.gain, default=None)
