"""Profiles solved from measured passes, and their files."""

import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import script
from tiny_plan import machine, setup
from twotower.lab.plan import PlanOptions, make_plan
from twotower.lab.plan.inputs import Efficiency
from twotower.lab.plan.options import read_profile
from twotower.lab.plan.passes import Pass, time_pass

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "gpu"))
fit = script("fit")
TRUE = Efficiency(bandwidth=0.62, arithmetic=0.31, layer_s=7e-6)


def timed(slower: float = 1.0) -> list[Any]:
    """Passes that a machine of the true efficiency would make, from launches to arithmetic."""
    found = []
    for rows, tokens in ((1, 1), (1, 16), (16, 16), (64, 64)):
        call = Pass(tower="context", rows=rows, tokens=tokens, logits=tokens, past=512)
        one = setup(machine(tflops={"bfloat16": 0.02}), TRUE)
        found.append(fit.Timed(one, call, time_pass(one, call).seconds * slower))
    return found


def test_a_fit_finds_what_made_the_times() -> None:
    """Guards the planner's answers on a new machine: a fit that stops early is a wrong machine."""
    found = fit.fit_efficiency(timed())
    assert fit.error_of(found, timed()) < 0.01
    assert found.bandwidth == pytest.approx(TRUE.bandwidth, rel=0.05)
    assert found.arithmetic == pytest.approx(TRUE.arithmetic, rel=0.05)
    assert fit.error_of(TRUE, timed(2.0)) == pytest.approx(0.693, abs=1e-3)


def test_a_plan_by_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    fit.write_profile(TRUE, file, "16 passes")
    assert read_profile(file) == TRUE
    record = make_plan(PlanOptions(hardware="h200", efficiency=str(file)))
    by_flags = PlanOptions(
        hardware="h200", bandwidth_share=0.62, arithmetic_share=0.31, layer_us=7.0
    )
    assert record["modes"] == make_plan(by_flags)["modes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "efficiency: cannot read .*none.toml \\(No such file or directory\\)"),
        ("a =", "efficiency: .* is not valid TOML"),
        ("bandwidth_share = 0.5", "must have numbers bandwidth_share, arithmetic_share, layer_us"),
        (
            "bandwidth_share = 1.5\narithmetic_share = 1\nlayer_us = 1",
            "bandwidth_share=1.5 must be above 0 and at most 1",
        ),
        (
            'bandwidth_share = "1"\narithmetic_share = 1\nlayer_us = 1',
            "must have numbers bandwidth_share",
        ),
    ],
)
def test_what_is_no_profile_is_told(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "none.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        make_plan(PlanOptions(efficiency=str(file)))


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(ValueError, match=r"efficiency: 'graph' is unknown.*ends in \.toml"):
        PlanOptions(efficiency="graph")
