"""The race's record from laps and times written by hand."""

from typing import Any

import pytest

from twotower.lab.race.contest import Heat, Lap
from twotower.lab.race.results import count_right, count_same, summarise_laps, summarise_passes


class Entrant:
    def __init__(self, engine: str, mode: str) -> None:
        self.engine, self.mode = engine, mode

    def run(self, heat: Heat) -> Lap:
        raise AssertionError("the laps are given")


ENTRANTS = [Entrant("pytorch", "ar"), Entrant("pytorch", "diffusion"), Entrant("llama.cpp", "ar")]


def lap(num_tokens: int, ms: float, decode_ms: float, nfe: int = 0) -> Lap:
    """decode_ms for all tokens but the first."""
    return Lap(
        tokens=list(range(num_tokens)),
        seconds=ms / 1e3,
        decode_seconds=decode_ms / 1e3,
        decode_tokens=num_tokens - 1,
        nfe=nfe,
        context_forwards=num_tokens,
    )


# Costs a token: ours 4, 6, 8; diffusion 2, 2, 8 (of 5, 5, 4 tokens); the rival's 2, 3, 2.
LAPS = [
    [lap(5, 20.0, 16.0), lap(5, 10.0, 4.0, nfe=2), lap(5, 10.0, 4.0)],
    [lap(5, 30.0, 20.0), lap(5, 10.0, 2.0, nfe=3), lap(5, 15.0, 8.0)],
    [lap(5, 40.0, 24.0), lap(4, 32.0, 3.0, nfe=2), lap(5, 10.0, 4.0)],
]
HEATS = [Heat(ids=[1], max_new_tokens=5)] * 3


def summarise() -> dict[str, Any]:
    return summarise_laps(ENTRANTS, HEATS, LAPS, ["pytorch"])


def test_costs_and_speedups() -> None:
    found = summarise()
    assert found["best_ar"] == ["llama.cpp", "ar"] and found["our_best_ar"] == ["pytorch", "ar"]
    diffusion = found["engines"]["pytorch"]["diffusion"]
    assert diffusion["ms_per_token"] == pytest.approx(2.0)
    assert diffusion["tokens_per_s"] == pytest.approx(14 / 0.052)
    assert (diffusion["nfe"], diffusion["tokens_per_nfe"]) == (7, 2.0)
    assert diffusion["speedup_vs_our_ar"] == pytest.approx(2.0)  # pairs 2, 3, 1
    assert diffusion["speedup_vs_best_ar"] == pytest.approx(1.0)  # pairs 1, 1.5, 0.25
    assert diffusion["speedup_vs_our_ar_quartiles"] == pytest.approx([1.5, 2.5])
    assert diffusion["speedup_vs_own_ar"] == diffusion["speedup_vs_our_ar"]
    rival = found["engines"]["llama.cpp"]["ar"]
    assert rival["speedup_vs_best_ar"] == 1.0
    assert rival["speedup_vs_own_ar"] == pytest.approx(2.0)  # pairs 2, 2, 4
    assert found["engines"]["pytorch"]["ar"]["tokens_per_nfe"] is None


def test_each_engine_has_its_own_ar() -> None:
    """Silent failure: a mode's gain over a slow AR is taken for the mode's, not the engine's."""
    entrants = [Entrant("pytorch", "ar"), Entrant("native", "ar"), Entrant("native", "speculative")]
    laps = [[lap(5, 20.0, 16.0), lap(5, 10.0, 8.0), lap(5, 5.0, 2.0)]]
    found: dict[str, Any] = summarise_laps(entrants, HEATS[:1], laps, ["pytorch", "native"])
    row = found["engines"]["native"]["speculative"]
    assert row["speedup_vs_own_ar"] == pytest.approx(2.0)
    assert row["decode_speedup_vs_own_ar"] == pytest.approx(4.0)
    assert found["engines"]["native"]["ar"]["speedup_vs_own_ar"] == 1.0


def test_decoding_alone() -> None:
    found = summarise()
    assert found["best_ar_decode"] == ["llama.cpp", "ar"] and found["best_ar_decode_ms"] == 1.0
    diffusion = found["engines"]["pytorch"]["diffusion"]
    assert diffusion["decode_ms_per_token"] == pytest.approx(1.0)  # 1, 0.5, 1
    assert diffusion["decode_speedup_vs_our_ar"] == pytest.approx(6.0)  # 4, 10, 6
    assert diffusion["decode_speedup_vs_best_ar"] == pytest.approx(1.0)  # 1, 4, 1


def test_answers_of_one_token_have_no_decoding() -> None:
    found: dict[str, Any] = summarise_laps(
        ENTRANTS[:1], HEATS[:1], [[lap(1, 5.0, 0.0)]], ["pytorch"]
    )
    row = found["engines"]["pytorch"]["ar"]
    assert row["ms_per_token"] == 5.0
    assert row["decode_ms_per_token"] is None and row["decode_speedup_vs_our_ar"] is None


def test_tokens_are_compared_with_our_ar() -> None:
    """The third diffusion answer is shorter than AR's."""
    assert count_same(ENTRANTS, LAPS, ["pytorch"]) == {
        ("pytorch", "ar"): 3, ("pytorch", "diffusion"): 2, ("llama.cpp", "ar"): 3,
    }  # fmt: skip


def test_an_engine_is_compared_with_its_own_ar() -> None:
    """Silent failure: one engine's rounding makes a lossless mode of another look lossy."""
    entrants = [Entrant("pytorch", "ar"), Entrant("native", "ar"), Entrant("native", "speculative")]
    laps = [[lap(5, 1.0, 1.0), lap(4, 1.0, 1.0), lap(4, 1.0, 1.0)]]
    found = count_same(entrants, laps, ["pytorch", "native"])
    assert found["native", "speculative"] == 1 and found["native", "ar"] == 1


def test_right_answers_are_counted_by_contestant() -> None:
    """Silent failure: the rival's answers are judged as ours."""
    heats = [Heat(ids=[1], max_new_tokens=5, is_right=lambda text: text == "4")] * 3
    found = count_right(ENTRANTS, heats, LAPS, decode=lambda tokens: str(len(tokens)))
    assert found == {
        ("pytorch", "ar"): 0, ("pytorch", "diffusion"): 1, ("llama.cpp", "ar"): 0,
    }  # fmt: skip


def test_passes_and_where_blocks_pay() -> None:
    times = {
        ("pytorch", "ar_step"): [3.4, 3.4, 9.0],
        ("pytorch", "denoise_pass"): [5.8, 5.0, 6.0],
        ("pytorch", "extend"): [5.0],
        ("pytorch", "verify"): [6.2],
        ("compiled", "ar_step"): [1.0],
        ("compiled", "denoise_pass"): [4.0],
        ("compiled", "extend"): [16.0],
        ("compiled", "verify"): [4.0],
    }
    found: dict[str, Any] = summarise_passes(times, best_ar_ms=0.5, block_size=16)
    assert found["ms"] == {"ar_step": 3.4, "denoise_pass": 5.8, "extend": 5.0, "verify": 6.2}
    assert found["ms_by_engine"]["pytorch"]["denoise_pass"]["n"] == 3
    pays = found["pays"]["pytorch"]
    assert pays["denoise_per_ar_step"] == pytest.approx(5.8 / 3.4)
    assert pays["needed_tokens_per_nfe"]["own_ar"]["2.42"] == pytest.approx(5.31, abs=0.005)
    assert pays["needed_tokens_per_nfe"]["best_ar"] == {"1": None, "2.42": None}
    assert pays["needed_tokens_per_cycle"]["own_ar"]["1"] == pytest.approx(12.0 / 3.4)
    at = pays["speedup_vs_best_ar_at_tokens_per_nfe"]
    assert at["4"] == pytest.approx(0.5 / (5.8 / 4 + 5.0 / 16))
    assert found["pays"]["compiled"]["needed_tokens_per_nfe"]["own_ar"]["1"] is None
