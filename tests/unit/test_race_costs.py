"""The race's arithmetic, with values computed by hand."""

import pytest

from twotower.lab.race.costs import (
    best_ar,
    block_cost,
    break_even,
    cycle_break_even,
    paired_speedup,
    spread,
    tokens_per_nfe,
)


def test_spread_is_median_and_quartiles() -> None:
    found = spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found.median, found.low, found.high, found.n) == (3.0, 2.0, 4.0, 5)
    assert spread([7.0]).to_dict() == {"median": 7.0, "quartiles": [7.0, 7.0], "n": 1}


def test_the_best_ar_has_the_lowest_median_among_the_engines() -> None:
    """Silent failure: a speed-up against a slow baseline, or against a mode that is not AR."""
    costs = {
        ("pytorch", "ar"): [4.0, 4.0, 4.0],
        ("pytorch", "diffusion"): [1.0, 1.0, 1.0],
        ("llama.cpp-f32", "ar"): [9.0, 2.0, 2.5],  # mean 4.5, median 2.5
    }
    assert best_ar(costs, ["pytorch", "llama.cpp-f32"]) == ("llama.cpp-f32", "ar")
    assert best_ar(costs, ["pytorch"]) == ("pytorch", "ar")


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


def test_tokens_per_nfe() -> None:
    assert tokens_per_nfe(12, 4) == 3.0 and tokens_per_nfe(12, 0) is None
