"""Turns, laps and names, with values computed by hand."""

from collections.abc import Sequence

import pytest

from tiny_models import prompts_of, tiny_model
from twotower import GenerateOptions
from twotower.lab.race.contest import Heat, Lap, RivalContestant, race, rival_name
from twotower.lab.race.ours import OurContestant
from twotower.lab.race.rivals import Decoded
from twotower.lab.race.script import Script


class Noting:
    """A contestant that notes when it starts."""

    mode = "ar"

    def __init__(self, engine: str, starts: list[str]) -> None:
        self.engine = engine
        self._starts = starts

    def run(self, heat: Heat) -> Lap:
        self._starts.append(self.engine + str(heat.ids[0]))
        return Lap(
            tokens=heat.ids, seconds=1.0, decode_seconds=1.0, decode_tokens=1,
            nfe=0, context_forwards=1 if self.engine == "a" else 2,
        )  # fmt: skip


def test_starts_rotate_and_laps_keep_their_place() -> None:
    """Silent failure: one contestant always runs into another's wake, or gets its figures."""
    starts: list[str] = []
    contestants = [Noting("a", starts), Noting("b", starts)]
    heats = [Heat(ids=[number], max_new_tokens=1) for number in range(3)]
    rows = list(race(contestants, heats))
    assert starts == ["a0", "b0", "a0", "b0", "b1", "a1", "a2", "b2"]  # two untimed
    assert [[lap.context_forwards for lap in row] for row in rows] == [[1, 2]] * 3
    assert [row[0].tokens for row in rows] == [[0], [1], [2]]


def test_costs_of_a_lap() -> None:
    lap = Lap(
        tokens=[1, 2, 3, 4], seconds=0.02, decode_seconds=0.012, decode_tokens=3,
        nfe=0, context_forwards=4,
    )  # fmt: skip
    assert lap.ms_per_token == pytest.approx(5.0)
    assert lap.decode_ms_per_token == pytest.approx(4.0)
    short = Lap(
        tokens=[2], seconds=0.1, decode_seconds=0.0, decode_tokens=0, nfe=0, context_forwards=1
    )
    assert short.decode_ms_per_token is None


class Stub:
    """A rival that writes what it is asked for."""

    name, dtype = "llama.cpp", "q8_0"

    def decode(self, ids: Sequence[int], num_new: int) -> Decoded:
        return Decoded(list(range(num_new)), 0.5, 0.25)

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        return []

    def close(self) -> None:
        pass


def test_a_rivals_lap() -> None:
    contestant = RivalContestant(Stub())
    assert (contestant.engine, contestant.mode) == ("llama.cpp-q8_0", "ar")
    lap = contestant.run(Heat(ids=[1], max_new_tokens=5))
    assert lap.seconds == 0.75 and len(lap.tokens) == 5
    assert lap.decode_ms_per_token == 62.5  # four tokens after the first
    script = Script(confidences=[], commits=[1, 1, 1])
    lap = contestant.run(Heat(ids=[1], max_new_tokens=5, scripts={"ar": script}))
    assert len(lap.tokens) == 3


def test_names() -> None:
    assert rival_name("llama.cpp", "float32") == "llama.cpp-f32"
    assert rival_name("llama.cpp", "float16") == "llama.cpp-f16"
    assert rival_name("transformers", "bfloat16") == "transformers"


@pytest.mark.parametrize(("mode", "given"), [("ar", 1), ("speculative", 1), ("diffusion", 0)])
def test_our_laps_leave_out_the_prompt(mode: str, given: int) -> None:
    """Silent failure: a token that reading the prompt gave for nothing counts as decoded."""
    options = GenerateOptions(
        mode=mode,  # type: ignore[arg-type]
        max_new_tokens=9,
        ignore_eos=True,
    )
    contestant = OurContestant("pytorch", tiny_model(), options)
    lap = contestant.run(Heat(ids=prompts_of([5])[0], max_new_tokens=9))
    assert (len(lap.tokens), lap.decode_tokens) == (9, 9 - given)
    assert 0 < lap.decode_seconds < lap.seconds < 60
    assert (lap.nfe > 0) == (mode != "ar")
