"""When drafting pays: judged by a row's own history alone, so that rows stay independent."""

# One draft and its verification cost about as much as this many AR steps (benchmarks/step_times.py
# measures it); fewer tokens than that a cycle, and AR decoding is the faster way.
BREAK_EVEN = 3.0
FIRST_PAUSE, LONGEST_PAUSE = 16, 64  # AR tokens before the next trial; doubles while trials fail


class Pace:
    """Draft while a cycle yields enough tokens, else decode token by token and try again later.

    A text that drafts badly costs a failed trial in 64 tokens at last, and two at the start: at
    least 0.9 of the speed of AR.
    """

    def __init__(self) -> None:
        self._expected = 2 * BREAK_EVEN  # tokens of a cycle: two bad ones are needed to give up
        self._pause = 0
        self._next_pause = FIRST_PAUSE

    @property
    def is_drafting(self) -> bool:
        """Whether the next cycle should have a draft."""
        return self._pause == 0

    def record_draft(self, accepted: int) -> None:
        """A cycle with a draft yielded `accepted` >= 1 tokens."""
        self._expected = (self._expected + accepted) / 2
        if self._expected >= BREAK_EVEN:
            self._next_pause = FIRST_PAUSE
            return
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)
        self._expected = BREAK_EVEN  # after the pause one good draft is enough to go on

    def record_token(self) -> None:
        """A cycle without a draft yielded its one token."""
        self._pause = max(0, self._pause - 1)
