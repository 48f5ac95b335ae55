"""Tables in a terminal of any width: side by side, on their side, or one below the other."""

import os
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from twotower.cli.text import printable
from twotower.lab.report import Table

_FILE_WIDTH = 120  # where nobody has a width: output that goes into a file
_MIN = 24  # columns that a text of several words may be squeezed to


def make_console() -> Console:
    """A console on stdout without colours for numbers."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if has_width else _FILE_WIDTH)


def print_table(console: Console, table: Table) -> None:
    """All of it, whatever the width: nothing is cut."""
    console.print()
    console.print(Text(table.title, style="bold"))
    columns, rows = [*table.columns], [[*row] for row in table.rows]
    turned = [list(column) for column in zip(columns, *rows, strict=True)]
    if fits(columns, rows, console.width):
        console.print(_grid(columns, rows, console.width))
    elif fits(turned[0], turned[1:], console.width):
        console.print(_grid(turned[0], turned[1:], console.width))
    else:
        for row in rows:
            console.print(Text(printable(row[0]), style="bold"))
            for column, cell in zip(columns[1:], row[1:], strict=True):
                console.print(Text(f"  {column.strip()}: {printable(cell)}"))


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Whether a grid can stand side by side: words are kept whole, texts of several words wrap."""
    return sum(_least_widths(columns, rows)) + len(columns) <= width


def _least_widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    widths = []
    for place, column in enumerate(columns):
        cells = [row[place] for row in rows]
        words = [word for text in (column, *cells) for word in text.split()] or [""]
        longest = max(map(len, cells), default=0)
        widths.append(max(*map(len, words), min(longest, _MIN)))
    return widths


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> RichTable:
    widths, count = _least_widths(columns, rows), len(columns)
    wanted = [max(map(len, (name, *cells))) for name, *cells in zip(columns, *rows, strict=True)]
    # A gap never makes a text wrap that has room without it.
    gap = int(sum(wanted if sum(wanted) + count <= width else widths) + 2 * count <= width)
    room = width - count - gap * count
    for place, most in enumerate(wanted):  # what is left goes to the texts that wrap
        widths[place] += min(max(0, most - widths[place]), max(0, room - sum(widths)))
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False)
    for place, (column, size) in enumerate(zip(columns, widths, strict=True)):
        is_text = place == 0 or any(" " in row[place].strip() for row in rows)
        grid.add_column(
            Text(column), width=size, justify="left" if is_text else "right", overflow="fold"
        )
    for row in rows:
        grid.add_row(*[Text(printable(cell)) for cell in row])
    return grid
