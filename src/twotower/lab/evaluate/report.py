"""A results record as one HTML file that needs nothing else, and its pictures as PNG files."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.lab.evaluate.examples import write_examples
from twotower.lab.evaluate.plots import Record, figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE = "report.html"
CAPTIONS = {
    "retention": (
        "Quality kept, by category",
        "The share of ar's accuracy that each mode keeps on the same prompts. Lines are 95 % "
        "intervals (paired bootstrap over items). Dashed: 98.7 %, what the announcement reports. "
        "Categories in which ar answers nothing right are left out.",
    ),
    "tradeoff": (
        "Quality against speed",
        "Diffusion decoding with other settings, on the first quarter of each category's items. "
        "Further right: fewer denoiser passes for the same text (left picture), or faster on this "
        "machine (right). Higher: more right answers. The number at a point is its threshold, or "
        "the most passes that a block may take. Dashed: ar on the same items.",
    ),
    "steps_by_block": (
        "Passes by block of the answer",
        "How many denoiser passes the first, second, ... block of an answer took on average; n "
        "answers were long enough to have it. Fewer passes: more tokens committed at a time.",
    ),
    "commit_order": (
        "Order of commits in a block",
        "The pass in which each position of a block was committed, on average. A rising line means "
        "left to right, a flat one no order. Kendall's tau is 1 for strictly left to right, 0 for "
        "no order, -1 for right to left.",
    ),
}
STYLE = """
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
_COLUMNS = (
    "accuracy %",
    "95 %",
    "kept %",
    "95 %",
    "same as ar",
    "tokens/NFE",
    "NFE",
    "tokens/ context pass",
    "tokens/s",
    "x ar",
    "loops",
)
_LEGEND = (
    "<p>accuracy: right answers, with the 95 % interval over items. kept: accuracy over that of "
    "ar, with its interval. tokens/NFE: tokens written per denoiser pass; NFE: denoiser passes in "
    "all. tokens/context pass: in speculative the acceptance length. tokens/s: reading the prompt "
    "included. x ar: how many times the speed of ar per token, median over prompts. loops: answers "
    "that ran into the token limit while repeating themselves.</p>"
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
        f"<title>Evaluation</title><style>{STYLE}</style></head><body>",
        f"<h1>What was kept: {escape(str(results['model']['path']))}</h1>",
        f"<p class='headline'>{escape(headline(results))}</p>",
        *_warnings(results),
        "<h2>All categories</h2>",
        _table(results["modes"]),
        _LEGEND,
        *[_picture(name, data) for name, data in pictures.items()],
    ]
    if not results.get("sweep"):
        parts.append("<p>No sweep was run: add --sweep to see quality against speed.</p>")
    for name, measured in results["categories"].items():
        parts += [f"<h2>{escape(name)}</h2>", _table(measured)]
    parts += _likelihood(results.get("likelihood"))
    parts += write_examples(results.get("items", []))
    kept = ("model", "items_per_category", "seed", "complete", "batch_size", "device", "dtype",
            "backend", "quantization", "threads", "sandbox", "options", "versions")  # fmt: skip
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
    title, explanation = CAPTIONS[name]
    source = base64.b64encode(data).decode()
    return (
        f"<h2>{title}</h2><figure><img alt='{title}' src='data:image/png;base64,{source}'>"
        f"<figcaption>{escape(explanation)}</figcaption></figure>"
    )


def _warnings(results: Record) -> list[str]:
    """What a reader must know before the figures."""
    if results.get("complete", True):
        return []
    return ["<p><strong>Interrupted: these are the results of the items done by then.</strong></p>"]


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
            "-" if row["same_as_ar"] is None else str(row["same_as_ar"]),
            _number(row["tokens_per_nfe"]),
            str(row["nfe"]),
            _number(row["tokens_per_forward"]),
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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _range(bounds: Sequence[float | None]) -> str:
    low, high = bounds
    return "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
