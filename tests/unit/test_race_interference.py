"""Disturbances of a timing, from counters written by hand."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from twotower.lab.race import interference
from twotower.lab.race.interference import (
    Snapshot,
    disturbances,
    other_cores,
    parse_clock,
    parse_stat,
    parse_swapped,
    parse_throttled,
    take_snapshot,
)

START = Snapshot(
    wall_s=100.0, own_s=10.0, busy_s=500.0, stolen_s=1.0,
    swapped_pages=7, throttled_periods=2, clock_mhz=2600.0,
)  # fmt: skip
# Ten seconds later, 15 of them ours on two cores.
END = replace(START, wall_s=110.0, own_s=25.0, busy_s=515.2)


def test_counters_are_read() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    text = "cpu  100 20 30 9999 888 4 6 50 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert parse_stat(text) == (160 / ticks, 50 / ticks)  # idle and waiting are not busy
    assert parse_swapped("pgpgin 5\npswpin 3\npswpout 4\n") == 7
    assert parse_throttled("nr_periods 9\nnr_throttled 2\nthrottled_time 8\n") == 2
    assert parse_clock("cpu MHz\t\t: 2596.1\nbogomips : 1\ncpu MHz\t\t: 1200.5\n") == 1200.5
    assert parse_stat("") == (None, None)
    assert (parse_swapped(""), parse_throttled(""), parse_clock("")) == (None, None, None)


def test_what_others_used() -> None:
    # Busy 15.2 s, ours 15 s, in 10 s.
    assert other_cores(START, END) == pytest.approx(0.02)
    assert other_cores(START, replace(END, own_s=20.0)) == pytest.approx(0.52)
    assert other_cores(START, replace(END, own_s=26.0)) == 0.0  # ticks are coarse
    assert other_cores(replace(START, busy_s=None), END) is None


def test_a_quiet_run_has_no_warning() -> None:
    assert disturbances(START, END, "race") == []
    nothing = replace(
        START, busy_s=None, stolen_s=None, swapped_pages=None, throttled_periods=None,
        clock_mhz=None,
    )  # fmt: skip
    assert disturbances(nothing, replace(nothing, wall_s=110.0), "race") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"own_s": 20.0}, "other processes used 0.52 cores"),
        ({"stolen_s": 1.5}, "the host took 0.05 cores"),
        ({"swapped_pages": 8}, "memory was swapped"),
        ({"throttled_periods": 3}, "throttled"),
        ({"clock_mhz": 2000.0}, "the clock fell from 2600 to 2000 MHz"),
    ],
)
def test_each_disturbance_is_told(changes: dict[str, float], words: str) -> None:
    """Silent failure: a figure measured beside a training run goes into the table."""
    (line,) = disturbances(START, replace(END, **changes), "race")  # type: ignore[arg-type]
    assert line.startswith("race: ") and words in line


def test_the_counters_of_this_machine_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = take_snapshot()
    sum(range(3_000_000))
    after = take_snapshot()
    assert after.wall_s > before.wall_s and after.own_s > before.own_s
    for name in ("STAT", "VMSTAT", "CPUINFO"):
        monkeypatch.setattr(interference, name, tmp_path / "missing")
    monkeypatch.setattr(interference, "CGROUP_STATS", (tmp_path / "missing",))
    assert take_snapshot().busy_s is None
