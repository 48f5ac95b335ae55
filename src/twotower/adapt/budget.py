"""How long each stage of a run may take, and how far it is."""

import math
import time
from dataclasses import dataclass
from typing import Literal, get_args

from twotower.arguments import check_fields, number

Stage = Literal["answers", "train", "measure"]
STAGES: tuple[Stage, ...] = get_args(Stage)
# Of a budget: the backbone writes and its features are kept; the rest is training, but for the end.
_ANSWERS, _MEASURE = 0.4, 0.05


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many seconds each stage of a run may take."""

    minutes: float
    overhead_s: float = 0.0
    """Of all that is no stage: loading, the estimate."""
    began: float | None = None
    """On the monotonic clock, the beginning of a run of all stages; None for one stage alone."""
    load_s: float = 0.0
    """Of loading. As long may take what lies between training and measuring: n-grams, files."""

    def __post_init__(self) -> None:
        check_fields(self, {"minutes": number(0, 1e6, is_above=True)})

    def seconds(self, stage: Stage) -> float:
        """Of one stage."""
        share = {"answers": _ANSWERS, "measure": _MEASURE}.get(stage, 1 - _ANSWERS - _MEASURE)
        return max(0.0, 60 * self.minutes - self.overhead_s) * share

    def left(self, stage: Stage) -> float:
        """Seconds from now until a stage must end, for the whole run to end in time."""
        if self.began is None:
            return math.inf
        after = self.load_s + self.seconds("measure") if stage == "train" else 0.0
        return self.began + 60 * self.minutes - after - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage is: of its seconds, and in words."""

    stage: Stage
    seconds: float
    of_seconds: float
    words: str


class Clock:
    """The seconds of a stage. used: those that it has had in earlier runs; more: what other stages
    left of theirs, or less what they took too much.
    """

    def __init__(self, stage: Stage, budget: Budget, used: float = 0.0, more: float = 0.0) -> None:
        self._stage, self._budget, self._of = stage, budget, budget.seconds(stage) + more
        self._began = time.monotonic() - used

    @property
    def used(self) -> float:
        """Seconds until now."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return min(self._of - self.used, self._budget.left(self._stage))

    @property
    def total(self) -> float:
        """Seconds that it may have."""
        return self.used + max(0.0, self.left)

    def progress(self, words: str) -> Progress:
        """Where the stage is."""
        return Progress(stage=self._stage, seconds=self.used, of_seconds=self.total, words=words)
