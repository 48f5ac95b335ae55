"""docs/cost.md says what the planner says."""

from scripts import script

cost_table = script("cost_table")


def test_the_page_has_todays_table() -> None:
    """Guards figures that a change of the planner makes stale; `python scripts/cost_table.py`
    writes them anew."""
    assert "30B-A3B" in cost_table.TABLE.page
    for table in (cost_table.TABLE, cost_table.SPEED_TABLE):
        assert table.filled() == table.page


def test_the_speed_of_diffusion_by_hand() -> None:
    """Two passes of 4 s and an extension of 2 s for 8 tokens, which are 8 steps of 2 s."""
    assert cost_table.speed_up((2.0, 4.0, 2.0), 8, 4.0) == 1.6


def test_a_thin_denoiser_costs_its_share() -> None:
    """Guards the planner's thin denoiser: one that counts the whole tower, or the whole head, would
    say that it never pays."""
    cells = [line.split(" | ") for line in cost_table.rows() if "dense" in line]
    lookup, thin, full = ([float(c.strip("| ")) for c in line[2:]] for line in cells)
    assert lookup[1] < thin[1] < 1.2 < full[1]
    assert thin[0] < 1.2 < full[0]
