"""Two modes on one prompt, side by side on one clock."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from page_driver import Driver, milliseconds, number, states

pytestmark = pytest.mark.browser

TOOLS = (
    "Tools:\nset_heating(room: string, degrees: integer)\n"
    "User: Make the bathroom 23 degrees warm.\nCall:"
)


def test_a_race_runs_both_modes_and_compares_them(tab: Driver, tmp_path: Path) -> None:
    """Guards the comparison: each lane must show its own run, the winner must be the faster, and a
    single run of each is no measurement."""
    tab.ask(TOOLS, "speculative", "ar", max_tokens=48).run()
    runs = tab.export(tmp_path)["runs"]
    assert [run["request"]["mode"] for run in runs] == ["speculative", "ar"]
    assert [run["state"] for run in runs] == ["finished", "finished"]
    for lane, run in enumerate(runs):
        figures = tab.figures(lane)
        assert figures["tokens"] == str(run["usage"]["completion_tokens"])
        assert figures["NFE"] == str(run["usage"]["nfe"])
        assert tab.written(lane) == run["text"]
        last = states(run)[-1]["elapsed_ms"]
        rate = run["usage"]["completion_tokens"] / last * 1000
        assert number(figures["tokens/s"]) == pytest.approx(rate, abs=0.51)
    assert runs[0]["text"] == runs[1]["text"] and "The texts are the same." in tab.status
    times = [states(run)[-1]["elapsed_ms"] for run in runs]
    winner = ("Speculative", "AR")[times.index(min(times))]
    assert tab.status.startswith(f"{winner} took ")
    assert re.search(r"took [\d.]+ m?s \([\d.]+ m?s to [\d.]+ m?s\), ", tab.status)
    assert ", medians of 5 runs each" in tab.status
    factor = max(times) / min(times)
    said = f"{factor:.1f} times as fast" if factor >= 1.05 else "about as fast"
    assert said in tab.status


def test_drafts_are_counted_as_the_server_counts_them(tab: Driver, tmp_path: Path) -> None:
    """Guards the running counts of accepted and rejected draft tokens, at the end and before."""
    tab.ask(TOOLS, "speculative", "ar", max_tokens=48).run()
    commits = [
        event
        for event in states(tab.export(tmp_path)["runs"][0])
        if event["object"] == "twotower.commit"
    ]
    drafts = [event for event in commits if event["drafted"]]
    accepted = sum(event["accepted"] for event in drafts)
    # A last commit of nothing but draft: the text ended there, what lay behind was not judged.
    judged = [event for event in drafts if event["accepted"] < len(event["tokens"])]
    assert len(judged) > 0
    figures = tab.figures(0)
    assert figures["drafts kept"] == str(accepted)
    assert figures["drafts rejected"] == str(sum(e["drafted"] - e["accepted"] for e in judged))
    assert "drafts kept" not in tab.figures(1)
    tab.scrub(1)
    assert tab.figures(0)["drafts kept"] == "0"


def test_both_lanes_follow_one_clock(tab: Driver, tmp_path: Path) -> None:
    """Guards fairness: at any moment each lane shows all of its events up to the same time, and
    none from later."""
    tab.ask(TOOLS, "speculative", "ar", max_tokens=24).run()
    runs = tab.export(tmp_path)["runs"]
    times = [[event["elapsed_ms"] for event in states(run)] for run in runs]
    assert tab.moments == sum(map(len, times))
    ordered = sorted(time for lane in times for time in lane)
    for moment in range(1, tab.moments + 1, 3):
        tab.scrub(moment)
        now = ordered[moment - 1]
        for lane in (0, 1):
            shown = milliseconds(tab.figures(lane)["time"])
            passed = [time for time in times[lane] if time < now]
            assert shown >= max(passed, default=0.0) * 0.99
            assert shown <= now * 1.01


def test_a_race_is_played_back_from_its_start(new_tab: Callable[..., Driver]) -> None:
    """Guards against a race that is over before anyone has seen it begin."""
    tab = new_tab(reduced_motion="no-preference").open()
    tab.ask(TOOLS, "speculative", "ar", max_tokens=24).run()
    assert tab.page.get_attribute("#play", "data-playing") == "true"
    early = int(tab.page.input_value("#scrub"))
    assert early < tab.moments
    tab.until(f"Number(document.querySelector('#scrub').value) > {early}")
    assert "slower than it ran" in tab.status
