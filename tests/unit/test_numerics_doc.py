"""docs/numerics.md promises that a test holds each claim: the tests it names must exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "numerics.md").read_text(encoding="utf-8")


def test_every_named_test_exists() -> None:
    """Guards against a page that outlives its tests."""
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE))
    assert len(named) > 20
    for file, test in named:
        (path,) = TESTS.rglob(file)
        assert f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_deliberate_difference_names_its_test() -> None:
    section = PAGE.split("## Deliberate differences")[1]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    assert all("::test_" in row for row in rows)
