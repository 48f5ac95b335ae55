"""The benchmark's record from measurements and times written by hand."""

from typing import Any

import pytest

from twotower.lab.bench.baselines import Measurement
from twotower.lab.bench.results import (
    best_ar,
    block_cost,
    break_even,
    cycle_break_even,
    measure_quality,
    paired_speedup,
    spread,
    summarise_measurements,
    summarise_passes,
)
from twotower.lab.bench.runners import TimedPrompt


def one(num_tokens: int, ms: float, decode_ms: float, nfe: int = 0) -> Measurement:
    """decode_ms for all tokens but the first."""
    return Measurement(
        tokens=list(range(num_tokens)),
        seconds=ms / 1e3,
        decode_seconds=decode_ms / 1e3,
        decode_tokens=num_tokens - 1,
        nfe=nfe,
        context_forwards=num_tokens,
    )


# Costs a token: ours 4, 6, 8; diffusion 2, 2, 8 (of 5, 5, 4 tokens); the baseline's 2, 3, 2.
ROWS = [
    [one(5, 20.0, 16.0), one(5, 10.0, 4.0, nfe=2), one(5, 10.0, 4.0)],
    [one(5, 30.0, 20.0), one(5, 10.0, 2.0, nfe=3), one(5, 15.0, 8.0)],
    [one(5, 40.0, 24.0), one(4, 32.0, 3.0, nfe=2), one(5, 10.0, 4.0)],
]
PROMPTS = [TimedPrompt(ids=[1], max_new_tokens=5)] * 3


NAMES = [("eager", "ar"), ("eager", "diffusion"), ("llama.cpp", "ar")]


def columns(names: list[tuple[str, str]], rows: list[list[Measurement]]) -> dict[Any, Any]:
    """Measurements by runner, each of a prompt."""
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def summarise() -> dict[str, Any]:
    return summarise_measurements(columns(NAMES, ROWS), ["eager"])


def test_costs_and_speedups() -> None:
    found = summarise()
    assert found["best_ar"] == ["llama.cpp", "ar"]
    diffusion = found["engines"]["eager"]["diffusion"]
    assert diffusion["ms_per_token"] == pytest.approx(2.0)
    assert diffusion["tokens_per_s"] == pytest.approx(14 / 0.052)
    assert (diffusion["nfe"], diffusion["tokens_per_nfe"]) == (7, 2.0)
    assert diffusion["speedup_vs_own_ar"] == pytest.approx(2.0)  # pairs 2, 3, 1
    assert diffusion["speedup_vs_best_ar"] == pytest.approx(1.0)  # pairs 1, 1.5, 0.25
    assert diffusion["speedup_vs_own_ar_quartiles"] == pytest.approx([1.5, 2.5])
    baseline = found["engines"]["llama.cpp"]["ar"]
    assert baseline["speedup_vs_best_ar"] == 1.0
    assert baseline["speedup_vs_own_ar"] == pytest.approx(2.0)  # pairs 2, 2, 4
    assert found["engines"]["eager"]["ar"]["tokens_per_nfe"] is None


def test_each_engine_has_its_own_ar() -> None:
    """Silent failure: a mode's gain over a slow AR is taken for the mode's, not the engine's."""
    names = [("eager", "ar"), ("native", "ar"), ("native", "speculative")]
    measured = [[one(5, 20.0, 16.0), one(5, 10.0, 8.0), one(5, 5.0, 2.0)]]
    found: dict[str, Any] = summarise_measurements(columns(names, measured), ["eager", "native"])
    row = found["engines"]["native"]["speculative"]
    assert row["speedup_vs_own_ar"] == pytest.approx(2.0)
    assert row["decode_speedup_vs_own_ar"] == pytest.approx(4.0)
    assert found["engines"]["native"]["ar"]["speedup_vs_own_ar"] == 1.0


def test_decoding_alone() -> None:
    found = summarise()
    assert found["best_ar_decode"] == ["llama.cpp", "ar"] and found["best_ar_decode_ms"] == 1.0
    diffusion = found["engines"]["eager"]["diffusion"]
    assert diffusion["decode_ms_per_token"] == pytest.approx(1.0)  # 1, 0.5, 1
    assert diffusion["decode_speedup_vs_own_ar"] == pytest.approx(6.0)  # 4, 10, 6
    assert diffusion["decode_speedup_vs_best_ar"] == pytest.approx(1.0)  # 1, 4, 1


def test_answers_of_one_token_have_no_decoding() -> None:
    found: dict[str, Any] = summarise_measurements(
        columns(NAMES[:1], [[one(1, 5.0, 0.0)]]), ["eager"]
    )
    row = found["engines"]["eager"]["ar"]
    assert row["ms_per_token"] == 5.0
    assert row["decode_ms_per_token"] is None and row["decode_speedup_vs_own_ar"] is None


def test_tokens_are_compared_with_our_ar() -> None:
    """The third diffusion answer is shorter than AR's."""
    found = measure_quality(columns(NAMES, ROWS), ["eager"], PROMPTS, str)
    assert [found[name]["same_tokens_as_own_ar"] for name in NAMES] == [3, 2, 3]


def test_an_engine_is_compared_with_its_own_ar() -> None:
    """Silent failure: one engine's rounding makes a lossless mode of another look lossy."""
    names = [("eager", "ar"), ("native", "ar"), ("native", "speculative")]
    measured = [[one(5, 1.0, 1.0), one(4, 1.0, 1.0), one(4, 1.0, 1.0)]]
    found = measure_quality(columns(names, measured), ["eager", "native"], PROMPTS[:1], str)
    assert [found[name]["same_tokens_as_own_ar"] for name in names[1:]] == [1, 1]


def test_right_answers_are_counted_by_runner() -> None:
    """Silent failure: the baseline's answers are judged as ours."""
    prompts = [TimedPrompt(ids=[1], max_new_tokens=5, is_right=lambda text: text == "4")] * 3
    judged = columns(NAMES, ROWS), ["eager"], prompts
    found = measure_quality(*judged, decode=lambda tokens: str(len(tokens)))
    assert [found[name]["correct"] for name in NAMES] == [0, 1, 0]
    assert found["eager", "diffusion"]["accuracy"] == pytest.approx(1 / 3)


def test_passes_and_where_blocks_pay() -> None:
    times = {
        ("eager", "ar_step"): [3.4, 3.4, 9.0],
        ("eager", "denoise_pass"): [5.8, 5.0, 6.0],
        ("eager", "extend"): [5.0],
        ("eager", "verify"): [6.2],
        ("compiled", "ar_step"): [1.0],
        ("compiled", "denoise_pass"): [4.0],
        ("compiled", "extend"): [16.0],
        ("compiled", "verify"): [4.0],
    }
    found: dict[str, Any] = summarise_passes(times, best_ar_ms=0.5, block_size=16)
    assert found["ms_by_engine"]["eager"]["denoise_pass"]["n"] == 3
    pays = found["pays"]["eager"]
    assert pays["denoise_per_ar_step"] == pytest.approx(5.8 / 3.4)
    assert pays["needed_tokens_per_nfe"]["own_ar"]["2.42"] == pytest.approx(5.31, abs=0.005)
    assert pays["needed_tokens_per_nfe"]["best_ar"] == {"1": None, "2.42": None}
    assert pays["needed_tokens_per_cycle"]["own_ar"]["1"] == pytest.approx(12.0 / 3.4)
    at = pays["speedup_vs_best_ar_at_tokens_per_nfe"]
    assert at["4"] == pytest.approx(0.5 / (5.8 / 4 + 5.0 / 16))
    assert found["pays"]["compiled"]["needed_tokens_per_nfe"]["own_ar"]["1"] is None


def test_spread_is_median_and_quartiles() -> None:
    found = spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_the_best_ar_has_the_lowest_median_among_the_engines() -> None:
    """Silent failure: a speed-up against a slow baseline, or against a mode that is not AR."""
    costs = {
        ("eager", "ar"): [4.0, 4.0, 4.0],
        ("eager", "diffusion"): [1.0, 1.0, 1.0],
        ("llama.cpp-f32", "ar"): [9.0, 2.0, 2.5],  # mean 4.5, median 2.5
    }
    assert best_ar(costs, ["eager", "llama.cpp-f32"]) == ("llama.cpp-f32", "ar")
    assert best_ar(costs, ["eager"]) == ("eager", "ar")


def test_speedups_are_paired() -> None:
    """Silent failure: a ratio of medians, in which a hard item of one meets an easy one."""
    found = paired_speedup([2.0, 8.0, 9.0], [1.0, 2.0, 9.0])
    assert found.median == 2.0  # 2, 4, 1; the medians' ratio would be 4
    assert (found.low, found.high) == (1.5, 3.0)
    with pytest.raises(ValueError, match="shorter"):
        paired_speedup([1.0, 2.0], [1.0])


def test_the_cost_of_a_token_in_a_block() -> None:
    # 16 tokens in 4 passes of 6 ms and an extension of 8 ms: 32 ms.
    assert block_cost(6.0, 8.0, 4.0, 16) == 2.0


def test_break_even() -> None:
    """The figures of the study: 3.4, 5.8, 5.0 ms need 5.3 tokens a pass for 2.42 times AR."""
    needed = break_even(3.4, 5.8, 5.0, 2.42, 16)
    assert needed == pytest.approx(5.31, abs=0.005)
    assert needed is not None
    assert 3.4 / block_cost(5.8, 5.0, needed, 16) == pytest.approx(2.42)
    assert break_even(2.0, 4.0, 16.0, 1.0, 16) == 4.0  # 4 / (2/1 - 16/16)
    assert break_even(2.0, 4.0, 32.0, 1.0, 16) is None  # the extension alone costs as much
    assert break_even(2.0, 20.0, 16.0, 1.0, 16) is None  # 20 tokens a pass of 16


def test_break_even_of_a_cycle() -> None:
    assert cycle_break_even(2.0, 3.0, 5.0, 2.0) == 8.0
