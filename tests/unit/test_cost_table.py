"""docs/cost.md says what the planner says."""

from scripts import script

cost_table = script("cost_table")


def test_the_page_has_todays_table() -> None:
    """Guards figures that a change of the planner makes stale; `python scripts/cost_table.py`
    writes them anew."""
    assert "30B-A3B" in cost_table.TABLE.page
    assert cost_table.TABLE.filled() == cost_table.TABLE.page


def test_a_thin_denoiser_costs_its_share() -> None:
    """Guards the planner's thin denoiser: one that counts the whole tower, or the whole head, would
    say that it never pays."""
    cells = [line.split(" | ") for line in cost_table.rows() if "dense" in line]
    lookup, thin, full = ([float(c.strip("| ")) for c in line[2:]] for line in cells)
    assert lookup[1] < thin[1] < 1.2 < full[1]
    assert thin[0] < 1.2 < full[0]
