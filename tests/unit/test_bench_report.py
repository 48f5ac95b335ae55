"""Pictures and sentences of a benchmark, from a recorded one."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from twotower.lab.bench.report import describe_break_even, plot_break_even

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    record = json.loads((RESULTS / "race_1_thread_cpu_2026-11-26.json").read_text())
    return record["sizes"]["shipped"]


def test_measured_points_wear_their_engine_s_colour(found: dict[str, object]) -> None:
    """Silent failure: names printed over each other, so that nobody can tell whose a point is."""
    figure = plot_break_even("shipped", found)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    drawn = {
        (line.get_xdata()[0], line.get_ydata()[0]): (line.get_color(), line.get_marker())
        for line in axes.lines
        if line.get_fillstyle() == "full" and len(line.get_xdata()) == 1
    }
    markers = {}
    for engine in found["ms_by_engine"]:
        curve = lines[f"{engine} over its own AR step"]
        for mode in ("diffusion", "speculative"):
            row = found["engines"][engine][mode]
            place = (row["tokens_per_nfe"], row["decode_speedup_vs_best_ar"])
            color, markers[engine, mode] = drawn[place]
            assert color == curve.get_color()
    assert len(set(markers.values())) == 2 and markers["native", "diffusion"] == "s"
    assert not any("diffusion" in text.get_text() for text in axes.texts)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "diffusion, measured over the best AR" in legend


def test_what_no_number_of_tokens_reaches_is_said(found: dict[str, object]) -> None:
    """Silent failure: 32 accepted tokens asked of a cycle of 16."""
    pays = {
        "denoise_per_ar_step": 2.0, "extend_per_ar_step": 1.0, "verify_per_ar_step": 1.5,
        "needed_tokens_per_nfe": {"own_ar": {"2.42": 4.5}, "best_ar": {"2.42": None}},
        "needed_tokens_per_cycle": {"own_ar": {"2.42": 8.0}, "best_ar": {"2.42": 32.6}},
    }  # fmt: skip
    _, own, best = describe_break_even("native", pays, found).splitlines()
    assert own.endswith("4.5 tokens/NFE in blocks, 8.0 tokens a cycle of speculation.")
    assert best.endswith("out of reach in blocks, out of reach of speculation.")
    assert "32.6" not in best
