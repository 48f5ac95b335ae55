"""A results record as one HTML file that needs nothing else, and its pictures as PNG files."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.evaluate.plots import Record, figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE = "report.html"
EXAMPLES_PER_CATEGORY = 2
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } .headline { font-size: 1.3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: white; border-radius: 4px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; }
.wrong { border-left: 4px solid #D55E00; } .right { border-left: 4px solid #009E73; }
"""
_COLUMNS = (
    "accuracy %",
    "95 %",
    "kept %",
    "95 %",
    "tokens/NFE",
    "NFE",
    "tokens/s",
    "x ar",
    "loops",
)


def write_report(results: Record, folder: Path) -> list[Path]:
    """Write report.html and a PNG per picture into `folder`; returns the paths written.

    `results` is the record that results.json holds, so an old report can be made anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: to_png(figure) for name, figure in figures(results).items()}
    paths = []
    for name, data in pictures.items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(data)
    paths.append(folder / REPORT_FILE)
    paths[-1].write_text(to_html(results, pictures), encoding="utf-8")
    return paths


def to_png(figure: "Figure") -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def to_html(results: Record, pictures: Mapping[str, bytes]) -> str:
    """The whole page: headline, pictures, tables, examples, what was run."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Evaluation</title><style>{_STYLE}</style></head><body>",
        f"<h1>What was kept: {escape(str(results['model']['path']))}</h1>",
        f"<p class='headline'>{escape(headline(results))}</p>",
        *[_picture(name, data) for name, data in pictures.items()],
    ]
    if not results.get("sweep"):
        parts.append("<p>No sweep was run: add --sweep to see quality against speed.</p>")
    for name, measured in {"all": results["modes"], **results["categories"]}.items():
        parts += [f"<h2>{escape(name)}</h2>", _table(measured)]
    parts += _likelihood(results.get("likelihood"))
    parts += _examples(results.get("items", []))
    kept = ("model", "suite", "items_per_category", "seed", "batch_size", "device", "dtype",
            "threads", "options", "versions")  # fmt: skip
    run = json.dumps({name: results[name] for name in kept if name in results}, indent=1)
    parts += ["<h2>How it was run</h2>", f"<pre>{escape(run)}</pre></body></html>"]
    return "\n".join(parts)


def headline(results: Record) -> str:
    """The announcement's pair for every mode but ar, in a sentence each."""
    sentences = []
    for mode, row in results["modes"].items():
        if mode == "ar" or row["retention"] is None:
            continue
        low, high = row["retention_interval"]
        passes = (
            "" if row["tokens_per_nfe"] is None else f", {row['tokens_per_nfe']:.2f} tokens/NFE"
        )
        sentences.append(
            f"{mode} keeps {100 * row['retention']:.1f} % of the AR quality (95 %: {100 * low:.1f} "
            f"to {100 * high:.1f} %) at {row['speed_ratio'] or 0:.2f} times its speed{passes}."
        )
    return " ".join(sentences) or "No mode was compared with ar, so there is no retention."


def _picture(name: str, data: bytes) -> str:
    source = base64.b64encode(data).decode()
    return f"<p><img alt='{escape(name)}' src='data:image/png;base64,{source}'></p>"


def _table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in ("mode", *_COLUMNS))
    rows = []
    for mode, row in measured.items():
        cells = [
            escape(mode),
            _percent(row["accuracy"]),
            _range(row["interval"]),
            _percent(row["retention"]),
            _range(row["retention_interval"]),
            _number(row["tokens_per_nfe"]),
            str(row["nfe"]),
            f"{row['tokens_per_s']:.0f}",
            _number(row["speed_ratio"]),
            str(row["degenerate"]),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _likelihood(record: Record | None) -> list[str]:
    """Nats per token of the reference answers, by category; nothing if they were not scored."""
    if record is None:
        return []
    rows = []
    for name, row in {**record["categories"], "all": record["all"]}.items():
        bound, error = row["bound_nats_per_token"], row["bound_standard_error"]
        shown = "-" if bound is None else f"{bound:.4f} &plusmn; {error:.4f}"
        cells = [escape(name), str(row["tokens"]), f"{row['ar_nats_per_token']:.4f}", shown]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    columns = ("category", "tokens", "ar nats/token", "denoiser's bound")
    head = "".join(f"<th>{column}</th>" for column in columns)
    return [
        "<h2>likelihood of the reference answers</h2>",
        f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>",
    ]


def _examples(items: Sequence[Record]) -> list[str]:
    """Per category the first items on which the modes' verdicts are most telling: wrong first."""
    parts = ["<h2>Examples</h2>"] if items else []
    for category in dict.fromkeys(item["category"] for item in items):
        mine = [item for item in items if item["category"] == category]
        mine.sort(key=lambda item: sum(o["correct"] for o in item["outputs"].values()))
        for item in [mine[0], mine[-1]][: min(len(mine), EXAMPLES_PER_CATEGORY)]:
            parts.append(_example(item))
    return parts


def _example(item: Record) -> str:
    prompt = item["prompt"] if len(item["prompt"]) < 1200 else "... " + item["prompt"][-1200:]
    lines = [f"<h3>{escape(item['category'])} {item['index']}</h3>", f"<pre>{escape(prompt)}</pre>"]
    for mode, output in item["outputs"].items():
        kind = "right" if output["correct"] else "wrong"
        note = output["reason"] or "right"
        lines.append(f"<p>{escape(mode)}: {escape(note)}, {output['nfe']} NFE</p>")
        lines.append(f"<pre class='{kind}'>{escape(output['text'])}</pre>")
    return "\n".join([*lines, f"<p>reference</p><pre>{escape(item['reference'])}</pre>"])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _range(bounds: Sequence[float | None]) -> str:
    low, high = bounds
    return "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
