"""docs/cost.md says what the planner says."""

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "cost_table.py"
spec = importlib.util.spec_from_file_location("cost_table", SCRIPT)
assert spec is not None and spec.loader is not None
cost_table = importlib.util.module_from_spec(spec)
sys.modules["cost_table"] = cost_table
spec.loader.exec_module(cost_table)


def test_the_page_has_todays_table() -> None:
    """Guards figures that a change of the planner makes stale; `python scripts/cost_table.py`
    writes them anew."""
    page = cost_table.PAGE.read_text(encoding="utf-8")
    assert "30B-A3B" in page
    assert cost_table.filled(page) == page


def test_a_thin_denoiser_costs_its_share() -> None:
    """Guards the planner's thin denoiser: one that counts the whole tower, or the whole head, would
    say that it never pays."""
    cells = [line.split(" | ") for line in cost_table.rows() if "dense" in line]
    lookup, thin, full = ([float(c.strip("| ")) for c in line[2:]] for line in cells)
    assert lookup[1] < thin[1] < 1.2 < full[1]
    assert thin[0] < 1.2 < full[0]
