"""Who races, on what, and in which order: all contestants take turns on every prompt."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from twotower.lab.race.costs import AR
from twotower.lab.race.rivals import Rival
from twotower.lab.race.script import Script

PAUSE_S = 0.01  # before each start: the last contestant's idle threads stop spinning
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Heat:
    """One prompt that every contestant continues.

    is_right: judges a text, None where texts mean nothing. scripts: by mode, the commits to repeat;
    empty where a contestant decides itself what it writes, up to max_new_tokens.
    """

    ids: list[int]
    max_new_tokens: int
    is_right: Callable[[str], bool] | None = None
    scripts: Mapping[str, Script] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One contestant's answer to one heat and what it cost.

    Decoding begins when the first token is known (block modes: when the prompt is read) and yields
    `decode_tokens` tokens.
    """

    tokens: list[int]
    seconds: float
    decode_seconds: float
    decode_tokens: int
    nfe: int
    context_forwards: int

    @property
    def ms_per_token(self) -> float:
        """From the prompt to the last token, by tokens."""
        return 1e3 * self.seconds / max(1, len(self.tokens))

    @property
    def decode_ms_per_token(self) -> float | None:
        """Without reading the prompt; None where that was all."""
        return 1e3 * self.decode_seconds / self.decode_tokens if self.decode_tokens else None


class Contestant(Protocol):
    """An engine in one mode."""

    @property
    def engine(self) -> str: ...

    @property
    def mode(self) -> str: ...

    def run(self, heat: Heat) -> Lap:
        """Continue the heat's prompt, timed."""


class RivalContestant:
    """Somebody else's greedy decoding. In a replay it writes as many tokens as our AR did."""

    mode = AR

    def __init__(self, rival: Rival) -> None:
        self._rival = rival
        self.engine = rival_name(rival.name, rival.dtype)

    def run(self, heat: Heat) -> Lap:
        script = heat.scripts.get(AR)
        limit = heat.max_new_tokens if script is None else script.num_tokens
        found = self._rival.decode(heat.ids, limit)
        return Lap(
            tokens=found.tokens,
            seconds=found.prefill_seconds + found.decode_seconds,
            decode_seconds=found.decode_seconds,
            decode_tokens=len(found.tokens) - 1,
            nfe=0,
            context_forwards=len(found.tokens),
        )


def rival_name(name: str, dtype: str) -> str:
    """What the table calls it: llama.cpp with its precision, transformers in ours."""
    return name if name == "transformers" else f"{name}-{_SHORT.get(dtype, dtype)}"


def race(contestants: Sequence[Contestant], heats: Sequence[Heat]) -> Iterator[list[Lap]]:
    """Yield each heat's laps in the contestants' order; the order of starts rotates.

    Before the first heat each contestant runs it once untimed: first calls pay for later ones.
    """
    for contestant in contestants:
        contestant.run(heats[0])
    for turn, heat in enumerate(heats):
        laps: dict[int, Lap] = {}
        for place in range(len(contestants)):
            number = (turn + place) % len(contestants)
            time.sleep(PAUSE_S)
            laps[number] = contestants[number].run(heat)
        yield [laps[number] for number in range(len(contestants))]
