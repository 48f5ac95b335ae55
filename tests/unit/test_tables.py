"""Tables in a terminal of any width."""

import pytest

from twotower.cli.tables import make_console, print_table
from twotower.lab.evaluate.report import _MODE_COLUMNS
from twotower.lab.report import Table


@pytest.mark.parametrize("rate", ["97", "970", "9,700", "97,000", "970,000"])
@pytest.mark.parametrize("kept", ["-", "100.0"])
def test_a_heading_is_whole_where_it_has_room(
    rate: str, kept: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: a wider figure in one column splits the headings of others, so that a fast
    machine shows "kept" and "%" on two lines, for the sake of a gap between columns.
    """
    monkeypatch.setenv("COLUMNS", "80")
    row = ["speculative", "100.0", kept, kept, kept, "2", "1.23", "45", "6.78", rate, "0.91", "0"]
    print_table(make_console(), Table(title="math", columns=_MODE_COLUMNS, rows=[row]))
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "kept" in line).startswith("mode")
    assert max(map(len, lines)) <= 80
