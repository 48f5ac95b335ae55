"""A plan as one HTML file that needs nothing else, as JSON, and its pictures as PNG files."""

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from twotower.lab.evaluate.report import REPORT_FILE, STYLE, to_png
from twotower.lab.plan.plots import Record, plan_figures
from twotower.lab.plan.sentences import (
    ASSUMPTIONS,
    MODE_COLUMNS,
    PASS_COLUMNS,
    headline,
    memory_lines,
    mode_row,
    pass_row,
)

PLAN_FILE = "plan.json"
CAPTIONS = {
    "speed": (
        "Speed by batch",
        "Tokens a second of all rows together, prompts included, with at most so many rows at a "
        "time. A line stays level where more rows do not fit or would only push experts out of "
        "the device: the others wait.",
    ),
    "break_even": (
        "Break-even",
        "How many times as fast as AR diffusion decodes, by the tokens that a denoiser pass "
        "commits, at the batch asked for, one group of rows.",
    ),
    "memory": (
        "Memory",
        "What each device holds at the end of the answers. Dense: all weights but the routed "
        "experts. Experts in host memory are not in the bars.",
    ),
    "passes": (
        "Where the time goes",
        "A part of a pass takes the longer of its streaming and its arithmetic; both count only "
        "where they rule. Overhead goes with the layers.",
    ),
}


def write_plan(record: Record, folder: Path) -> list[Path]:
    """Write plan.json, report.html and a PNG per picture into `folder`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: to_png(figure) for name, figure in plan_figures(record).items()}
    paths = [folder / PLAN_FILE]
    paths[0].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, data in pictures.items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(data)
    paths.append(folder / REPORT_FILE)
    paths[-1].write_text(to_html(record, pictures), encoding="utf-8")
    return paths


def to_html(record: Record, pictures: Mapping[str, bytes]) -> str:
    """The whole page: headline, tables, pictures, assumptions, what was asked."""
    title = f"{record['model']['name']} on {record['devices']} x {record['hardware']['name']}"
    modes = [[mode, *mode_row(found)] for mode, found in record["modes"].items()]
    passes = [[call, *pass_row(found)] for call, found in record["passes"].items()]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Plan</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *[
            f"<p class='headline'>{escape(line)}</p>"
            for line in [*memory_lines(record), *headline(record)]
        ],
        "<p>Predicted, not measured.</p>",
        "<h2>Modes</h2>",
        _table(("mode", *MODE_COLUMNS), modes),
        "<h2>Passes</h2>",
        _table(("pass", *PASS_COLUMNS), passes),
        *[_picture(name, data) for name, data in pictures.items()],
        "<h2>What is assumed</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in ASSUMPTIONS) + "</ul>",
        "<h2>What was asked</h2>",
        f"<pre>{escape(json.dumps(_asked(record), indent=1))}</pre></body></html>",
    ]
    return "\n".join(parts)


def _asked(record: Record) -> dict[str, Any]:
    kept = ("model", "hardware", "devices", "precision", "compute", "efficiency", "workload")
    return {name: record[name] for name in kept}


def _picture(name: str, data: bytes) -> str:
    title, explanation = CAPTIONS[name]
    source = base64.b64encode(data).decode()
    return (
        f"<h2>{title}</h2><figure><img alt='{title}' src='data:image/png;base64,{source}'>"
        f"<figcaption>{escape(explanation)}</figcaption></figure>"
    )


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"
