"""Turns and costs of runners, with values computed by hand."""

from collections.abc import Sequence

import pytest

from tiny_models import prompts_of, tiny_model
from twotower import GenerateOptions, TwoTower
from twotower.backends import accelerate
from twotower.lab.bench import runners as module
from twotower.lab.bench.baselines import Measurement, llama_cpp_name
from twotower.lab.bench.replay import Script
from twotower.lab.bench.runners import (
    BaselineRunner,
    OurRunner,
    TimedPrompt,
    open_engines,
    take_turns,
)


class Noting:
    """A runner that notes when it starts."""

    mode = "ar"

    def __init__(self, engine: str, starts: list[str]) -> None:
        self.engine = engine
        self._starts = starts

    def run(self, prompt: TimedPrompt) -> Measurement:
        self._starts.append(self.engine + str(prompt.ids[0]))
        return Measurement(
            tokens=prompt.ids, seconds=1.0, decode_seconds=1.0, decode_tokens=1,
            nfe=0, context_forwards=1 if self.engine == "a" else 2,
        )  # fmt: skip


def test_starts_rotate_and_laps_keep_their_place() -> None:
    """Silent failure: one runner always runs into another's wake, or gets its figures."""
    starts: list[str] = []
    runners = [Noting("a", starts), Noting("b", starts)]
    prompts = [TimedPrompt(ids=[number], max_new_tokens=1) for number in range(3)]
    rows = list(take_turns(runners, prompts))
    assert starts == ["a0", "b0", "a0", "b0", "b1", "a1", "a2", "b2"]  # two untimed
    assert [[one.context_forwards for one in row] for row in rows] == [[1, 2]] * 3
    assert [row[0].tokens for row in rows] == [[0], [1], [2]]


def test_costs_of_a_lap() -> None:
    one = Measurement(
        tokens=[1, 2, 3, 4], seconds=0.02, decode_seconds=0.012, decode_tokens=3,
        nfe=0, context_forwards=4,
    )  # fmt: skip
    assert one.ms_per_token == pytest.approx(5.0)
    assert one.decode_ms_per_token == pytest.approx(4.0)
    short = Measurement(
        tokens=[2], seconds=0.1, decode_seconds=0.0, decode_tokens=0, nfe=0, context_forwards=1
    )
    assert short.decode_ms_per_token is None


class Stub:
    """A baseline that writes what it is asked for."""

    name, dtype = "llama.cpp-q8_0", "q8_0"

    def decode(self, ids: Sequence[int], num_new: int) -> Measurement:
        return Measurement.of_ar(list(range(num_new)), 0.5, 0.25)

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        return []

    def close(self) -> None:
        pass


def test_a_baseline_in_a_race() -> None:
    runner = BaselineRunner(Stub())
    assert (runner.engine, runner.mode) == ("llama.cpp-q8_0", "ar")
    one = runner.run(TimedPrompt(ids=[1], max_new_tokens=5))
    assert one.seconds == 0.75 and len(one.tokens) == 5
    assert one.decode_ms_per_token == 62.5  # four tokens after the first
    script = Script(confidences=[], commits=[1, 1, 1])
    one = runner.run(TimedPrompt(ids=[1], max_new_tokens=5, scripts={"ar": script}))
    assert len(one.tokens) == 3


def test_names() -> None:
    names = [llama_cpp_name(dtype) for dtype in ("float32", "float16", "q8_0")]
    assert names == ["llama.cpp-f32", "llama.cpp-f16", "llama.cpp-q8_0"]


@pytest.mark.parametrize(("mode", "given"), [("ar", 1), ("speculative", 1), ("diffusion", 0)])
def test_our_laps_leave_out_the_prompt(mode: str, given: int) -> None:
    """Silent failure: a token that prefill gave for nothing counts as decoded."""
    options = GenerateOptions(
        mode=mode,  # type: ignore[arg-type]
        max_new_tokens=9,
        ignore_eos=True,
    )
    runner = OurRunner("eager", tiny_model(), options)
    one = runner.run(TimedPrompt(ids=prompts_of([5])[0], max_new_tokens=9))
    assert (len(one.tokens), one.decode_tokens) == (9, 9 - given)
    assert 0 < one.decode_seconds < one.seconds < 60
    assert (one.nfe > 0) == (mode != "ar")


def test_an_engine_that_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent failure: the engine that was asked for is left out of the table."""

    def build(model: TwoTower, backend: str, quantization: str) -> TwoTower:
        if backend == "native":
            raise ValueError("no compiler; install one")
        return accelerate(model, backend, quantization)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "accelerate", build)
    model = tiny_model()
    opened, unable = open_engines(model, ["native", "eager"], ["none"])
    assert opened == {"eager": model} and unable == ["native: no compiler; install one"]
    _, (first, second, third) = open_engines(model, ["native", "eager"], ["none", "int8"])
    assert first.startswith("native: ") and second.startswith("native-int8: ")
    assert third.startswith("eager-int8: ")
    with pytest.raises(ValueError, match="no backend can run this model: native: no"):
        open_engines(model, ["native"], ["none"])


def test_pairs_that_do_not_exist_are_left_out() -> None:
    """Guards a warning in every run by default: eager passes have no int8."""
    opened, unable = open_engines(
        tiny_model(hybrid_override_pattern="M*-"), ["eager", "native"], ["none", "int8", "int4"]
    )
    assert [*opened] == ["eager", "native", "native-int8", "native-int4"] and unable == []
