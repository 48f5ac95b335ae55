"""The validation's tables in Markdown, and their place in a page."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.plan_validation.rows import Row, median_error, worst_error


def summary_table(rows: Sequence[Row]) -> str:
    """A line per group: predicted rows only, not those that set a parameter."""
    lines = ["| figures | n | off by, median | worst |", "|---|---|---|---|"]
    for group in dict.fromkeys(row.group for row in rows):
        kept = [row for row in rows if row.group == group and not row.calibrated]
        lines.append(
            f"| {group} | {len(kept)} | {median_error(kept):.2f}x | {worst_error(kept):.1f}x |"
        )
    return "\n".join(lines)


def whole_table(rows: Sequence[Row], not_predicted: Mapping[str, str]) -> str:
    """Every row, and a list of what has none."""
    lines = ["| figure | predicted | measured | predicted / measured | |", "|---|---|---|---|---|"]
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** | | | | |")
        lines.append(f"| {' | '.join(_cells(row))} |")
    lines += ["", "Not predicted:", ""]
    return "\n".join([*lines, *(f"- {what}: {why}." for what, why in not_predicted.items())])


def _cells(row: Row) -> Iterator[str]:
    low, high = row.measured
    measured = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
    unit = f" {row.unit}" if row.unit else ""
    yield row.what
    yield _number(row.predicted) + unit
    yield measured + unit
    yield f"{row.ratio:.2f}"
    yield "; ".join(part for part in ("calibrated" if row.calibrated else "", row.note) if part)


def _number(value: float) -> str:
    """Three figures, or a count for people: 31.6B."""
    if value >= 1e9:
        return f"{value / 1e9:.3g}B"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def put_between(text: str, name: str, content: str) -> str:
    """The text with what stands between the marks of that name replaced."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have the marks {start.strip()} and {end} once each")
    head, rest = text.split(start)
    return f"{head}{start}{content}\n{end}{rest.split(end)[1]}"
