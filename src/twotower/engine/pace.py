"""When drafting pays: judged by a row's own history alone, so that rows stay independent."""

FIRST_PAUSE, LONGEST_PAUSE = 24, 96  # AR tokens before the next trial; doubles while trials fail


class Pace:
    """Draft while a cycle yields enough tokens, else decode token by token and try again later.

    break_even: AR steps that a draft and its verification cost; fewer tokens than that a cycle, and
    AR decoding is the faster way. A text that drafts badly costs one trial at the start, then one
    in 24, 48 and at last 96 tokens: at a break-even of 5, at least 0.9 of the speed of AR.
    """

    def __init__(self, break_even: float) -> None:
        self._break_even = break_even
        self._expected = (
            1.5 * break_even
        )  # tokens of a cycle; one very bad draft is enough to pause
        self._pause = 0
        self._next_pause = FIRST_PAUSE

    @property
    def is_drafting(self) -> bool:
        """Whether the next cycle should have a draft."""
        return self._pause == 0

    def record_draft(self, accepted: int) -> None:
        """A cycle with a draft yielded `accepted` >= 1 tokens."""
        self._expected = (self._expected + accepted) / 2
        if self._expected >= self._break_even:
            self._next_pause = FIRST_PAUSE
            return
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)
        self._expected = self._break_even  # after the pause one good draft is enough to go on

    def record_token(self) -> None:
        """A cycle without a draft yielded its one token."""
        self._pause = max(0, self._pause - 1)
