"""The validation of plans: its arithmetic, its parameters, and that docs/plan.md shows it."""

import json
from dataclasses import astuple
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("num2words")
pytest.importorskip("jsonschema")

from twotower.lab.plan.inputs import PROFILES


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.plan_validation import __main__

    return __main__


def test_errors_of_a_prediction(validation: ModuleType) -> None:
    """Silent failure: too small counts as less wrong than too large, or a range as its middle."""
    from benchmarks.plan_validation.rows import Row, median_error, worst_error

    def row(predicted: float, *measured: float) -> Row:
        ends = (measured[0], measured[-1])
        return Row(group="g", what="w", unit="ms", predicted=predicted, measured=ends)

    assert [row(p, 10, 20).ratio for p in (5, 10, 15, 20, 30)] == [0.5, 1, 1, 1, 1.5]
    rows = [row(2, 4), row(8, 4), row(3, 4)]
    assert median_error(rows) == pytest.approx(2) and worst_error(rows) == pytest.approx(2)
    assert median_error([row(1, 4), row(2, 4), row(4, 4)]) == pytest.approx(2)


def test_profiles_are_what_the_calibrated_figures_say(validation: ModuleType) -> None:
    """Silent failure: a parameter tuned by hand to please the table. Stored to three digits."""
    solved = validation.solved_profiles()
    assert set(solved) == {"eager-gpu", "eager-cpu", "native-cpu", "native-int8-cpu"}
    for name, found in solved.items():
        assert astuple(found) == pytest.approx(astuple(PROFILES[name]), rel=0.015), name


def test_the_page_shows_what_the_code_predicts(validation: ModuleType) -> None:
    """Silent failure: the model changes and the page goes on praising the old one.

    If this fails: python -m benchmarks.plan_validation, then python scripts/make_figures.py
    """
    rows = validation.all_rows()
    page = validation.DOCS.read_text(encoding="utf-8")
    assert validation.make_page(page) == page
    kept = json.loads(validation.RECORD.read_text())["rows"]
    assert [row.predicted for row in rows] == pytest.approx([row["predicted"] for row in kept])
    # A calibrated row is off by no more than the rounding of its parameters.
    assert all(row.ratio == pytest.approx(1, abs=0.02) for row in rows if row.calibrated)


def test_marks_of_a_page(validation: ModuleType) -> None:
    from benchmarks.plan_validation.tables import put_between

    page = "a\n<!-- t -->\nold\n<!-- end of t -->\nb"
    assert put_between(page, "t", "new") == "a\n<!-- t -->\nnew\n<!-- end of t -->\nb"
    with pytest.raises(ValueError, match="the page must have the marks <!-- u -->"):
        put_between(page, "u", "new")
