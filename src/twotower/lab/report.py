"""Tables, pictures and pages, as every part of the laboratory shows its records."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
REPORT_FILE = "report.html"
# Okabe and Ito's palette, which colour-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; overflow-wrap: anywhere; } .headline { font-size: 1.3rem; }
h2 { margin-top: 2.5rem; } figure { margin: 0; } figcaption { opacity: .85; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; }
summary { cursor: pointer; } pre { margin: .2rem 0 .8rem; } details p { margin: 0; opacity: .85; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { vertical-align: bottom; } td { white-space: nowrap; }
img { width: 100%; height: auto; background: white; border-radius: 4px; }
@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg); } }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; }
.wrong { border-left: 4px solid #D55E00; } .right { border-left: 4px solid #009E73; }
"""


@dataclass(frozen=True)
class Table:
    """Cells as text, for a terminal or a page; the first cell of a row is its name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def percent_range(bounds: Sequence[float | None], digits: int = 1) -> str:
    low, high = bounds
    if low is None or high is None:
        return "-"
    return f"{percent(low, digits)}-{percent(high, digits)}"


def new_figure(width: float = 7.0, height: float = 3.8) -> "Figure":
    """An empty figure that no global state knows; ImportError says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = 'matplotlib is not installed: pip install ".[eval]"'
        raise ImportError(message) from None
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(height: float = 3.8) -> "tuple[Figure, Axes]":
    """A figure with one picture."""
    figure = new_figure(height=height)
    return figure, figure.add_subplot()


def stack_bars(
    axes: "Axes", names: Sequence[str], parts: Mapping[str, Sequence[float]], unit: str
) -> None:
    """Lying bars, from above in the order of their names, each of the parts in their colours."""
    left = [0.0] * len(names)
    for color, (label, widths) in zip(COLORS, parts.items(), strict=False):
        axes.barh(names, widths, left=left, color=color, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def to_png(figure: "Figure") -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"


def html_picture(title: str, explanation: str, data: bytes) -> str:
    source = base64.b64encode(data).decode()
    return (
        f"<h2>{title}</h2><figure><img alt='{title}' src='data:image/png;base64,{source}'>"
        f"<figcaption>{escape(explanation)}</figcaption></figure>"
    )


def html_page(title: str, parts: Sequence[str]) -> str:
    """A page that needs nothing else."""
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            *parts,
            "</body></html>",
        ]
    )


def html_json(record: Record, names: Sequence[str]) -> str:
    """Some fields of a record, as they are."""
    kept = {name: record[name] for name in names if name in record}
    return f"<pre>{escape(json.dumps(kept, indent=1))}</pre>"


def write_files(
    folder: Path, record_name: str, record: Record, pictures: Mapping[str, bytes], page: str | None
) -> None:
    """The record as JSON, a PNG per picture, and the page; the folder is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / record_name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, data in pictures.items():
        (folder / f"{name}.png").write_bytes(data)
    if page is not None:
        (folder / REPORT_FILE).write_text(page, encoding="utf-8")
