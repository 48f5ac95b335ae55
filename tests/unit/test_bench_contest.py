"""A contest's arithmetic: who is compared with whom, prompt by prompt."""

from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models import tiny_model
from twotower import memory
from twotower.backends import Quantization
from twotower.lab.bench import contest
from twotower.lab.bench.baselines import Measurement
from twotower.lab.bench.contest import contest_table, summarise
from twotower.lab.bench.contestant import Contestant

PROMPTS = [[5] * 10, [5] * 20]


def who(engine: str, quantization: Quantization, mode: str) -> Contestant:
    return Contestant(
        engine=engine, quantization=quantization, mode=mode, file="f", threads=1, context=9
    )


def answers(*decode_s: float, tokens: int = 7, passes: int = 3) -> list[Measurement]:
    text = [tokens] * 11  # ten after the first
    each = [Measurement.of_ar(text, 0.5, s) for s in decode_s]
    return [replace(one, context_forwards=passes + 1) for one in each]


def test_ratios_are_of_the_same_quantisation_and_prompt() -> None:
    """Guards the table against a speed-up over other weights, over an engine's own drafts, or of
    medians of different prompts."""
    found = summarise(
        {
            who("twotower", "none", "ar"): answers(0.1, 0.3, passes=10),
            who("twotower", "int4", "ar"): answers(0.04, 0.06, tokens=8, passes=10),
            who("twotower", "int4", "speculative"): answers(0.02, 0.06, tokens=8, passes=5),
            who("llama.cpp", "none", "plain"): answers(0.2, 0.3),
            who("llama.cpp", "int4", "plain"): answers(0.08, 0.09),
            who("llama.cpp", "int4", "ngram-mod"): answers(0.06, 0.06, tokens=9),
        },
        PROMPTS,
    )
    full, plain, drafts, _, theirs, mod = found
    assert drafts["best"] == mod_name() and plain["best"] == mod_name()
    assert drafts["x_best"] == pytest.approx((3 + 1) / 2)
    assert drafts["x_plain"] == pytest.approx((2 + 1) / 2) and plain["x_plain"] == 1
    assert full["x_best"] == pytest.approx((2 + 1) / 2)
    assert theirs["best"] == "twotower int4 speculative"
    assert (plain["decode_ms"], plain["prompt_tokens_per_s"]) == (pytest.approx(5.0), 30.0)
    assert (plain["tokens_per_pass"], drafts["tokens_per_pass"]) == (1.0, 2.0)
    assert mod["tokens_per_pass"] is None
    assert [r["same_as_plain"] for r in (plain, drafts, mod)] == [2, 2, 0]
    assert [r["same_as_float32"] for r in (full, plain, theirs)] == [2, 0, 2]
    rows = contest_table(found, "t").rows
    assert rows[2][-2:] == ["2/2", "0/2"] and rows[2][5] == "2.00"


def mod_name() -> str:
    return who("llama.cpp", "int4", "ngram-mod").name


def test_the_denoiser_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a comparison whose speculative mode silently lacks the denoiser that was given, and
    memory: modes of one engine with the same weights share a process."""
    monkeypatch.setattr(contest, "_gguf", lambda *_: tmp_path / "x.gguf")
    pairs = ("auto", "eager"), ("int8",)
    found, missing = contest.contestants(tiny_model, tmp_path / "m", pairs, 1, 9, tmp_path, "d")
    assert not missing and len(found) > 4
    given = [one for one in found if one.denoiser == "d"]
    assert [one.mode for one in given] == ["ar", "speculative"] * 2
    assert {one.engine for one in given} == {"twotower"}
    assert {one.context for one in found} == {9}  # a longer prompt would end a rival's run
    assert len({replace(one, mode="") for one in given}) == 2


def test_who_cannot_take_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a table of ours alone that looks like a victory."""

    def refuse(*_: object) -> Path:
        raise ValueError("it has no such layer")

    monkeypatch.setattr(contest, "_gguf", refuse)
    found, missing = contest.contestants(
        tiny_model, tmp_path / "m", (("auto",), ("int4",)), 1, 9, tmp_path
    )
    assert {one.engine for one in found} == {"twotower"}
    assert missing == ["llama.cpp int4: it has no such layer"]


def test_who_fails_on_a_later_prompt_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an hour of measurements that one contestant's end throws away, and medians of fewer
    prompts beside those of all."""
    asked: list[tuple[str, int]] = []

    class Process:
        def __init__(self, engine: str) -> None:
            self.engine = engine

        def start(self, _: Contestant) -> None:
            pass

        def decode(self, ids: list[int], num_new: int, mode: str) -> Measurement:
            asked.append((mode, len(ids)))
            if mode == "ngram-mod" and len(ids) == 20 and num_new > 8:
                raise ValueError("its process has ended")
            return answers(0.1)[0]

        def close(self) -> None:
            pass

    monkeypatch.setattr(contest, "_Process", Process)
    three = [who("twotower", "int8", "ar")]
    three += [who("llama.cpp", "int8", mode) for mode in ("plain", "ngram-mod")]
    found, missing = contest.run_contest(three, [*PROMPTS, [5] * 30], 64, lambda _: None)
    assert missing == ["llama.cpp int8 ngram-mod: its process has ended"]
    assert {one.mode: len(each) for one, each in found.items()} == {"ar": 3, "plain": 3}
    assert asked.count(("ngram-mod", 20)) == 1 and ("ngram-mod", 30) not in asked
    assert [r["n"] for r in summarise(found, [*PROMPTS, [5] * 30])] == [3, 3]


def test_who_has_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the machine: llama.cpp's modes hold the weights once each, and the system ended the
    processes that would have won."""
    (tmp_path / "model.gguf").write_bytes(bytes(1000))
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 999)
    monkeypatch.setattr(memory, "_told", lambda _: 0)
    file = str(tmp_path / "model.gguf")
    one = replace(who("llama.cpp", "int4", "plain"), file=file)
    found, missing = contest.run_contest([one], PROMPTS, 4, lambda _: None)
    assert found == {} and missing[0].startswith("llama.cpp int4 plain: needs about 0.0 GB of mem")
