"""A results record for readers: tables, pictures, and one HTML page with all of it.

The tables are those of the terminal too. A part that is missing gives no table and no picture.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.lab.report import (
    COLORS,
    Record,
    Table,
    html_json,
    html_page,
    html_picture,
    html_table,
    new_axes,
    new_figure,
    number,
    percent,
    percent_range,
    to_png,
    write_files,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RECORD_FILE = "results.json"
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
LEGEND = (
    "acc: right answers, with the 95 % interval over items. kept: accuracy over that of ar, with "
    "its interval. =ar: answers whose text is ar's. t/NFE: tokens written per denoiser pass; NFE: "
    "denoiser passes in all. t/ctx: tokens per pass of the context tower, in speculative the "
    "acceptance length. t/s: tokens a second, prefill included. x ar: how many times "
    "the speed of ar per token, median over prompts. loops: answers that ran into the token limit "
    "while repeating themselves."
)
_MODE_COLUMNS = (
    "mode", "acc %", "95 %", "kept %", "95 %", "=ar", "t/NFE", "NFE", "t/ctx", "t/s", "x ar",
    "loops",
)  # fmt: skip
_SWEEP_COLUMNS = ("threshold", "most passes", "acc %", "kept %", "t/NFE", "t/s", "x ar")
_LIKELIHOOD_COLUMNS = ("category", "tokens", "ar nats/token", "bound nats/token", "+-")
_HOW = (
    "model", "items_per_category", "seed", "complete", "batch_size", "device", "dtype", "backend",
    "quantization", "threads", "sandbox", "options", "versions",
)  # fmt: skip
SHOWN = {"modes disagree": 12, "wrong in every mode": 4, "right in every mode": 1}
PROMPT_CHARS = 1200


def write_report(results: Record, folder: Path) -> None:
    """results.json, report.html and a PNG per picture; an old record can be made a report anew."""
    pictures = {name: to_png(figure) for name, figure in figures(results).items()}
    write_files(folder, RECORD_FILE, results, pictures, to_html(results, pictures))


def to_html(results: Record, pictures: Mapping[str, bytes]) -> str:
    """The whole page: headline, pictures, tables, examples, what was run."""
    parts = [
        f"<h1>What was kept: {escape(str(results['model']['path']))}</h1>",
        f"<p class='headline'>{escape(headline(results))}</p>",
    ]
    if not results.get("complete", True):
        cut = "Interrupted: these are the results of the items done by then."
        parts.append(f"<p><strong>{cut}</strong></p>")
    overall, *others = tables(results, digits=1)
    parts += ["<h2>All categories</h2>", html_table(overall), f"<p>{escape(LEGEND)}</p>"]
    parts += [html_picture(*CAPTIONS[name], data) for name, data in pictures.items()]
    if not results.get("sweep"):
        parts.append("<p>No sweep was run: add --sweep to see quality against speed.</p>")
    for table in others:
        parts += [f"<h2>{escape(table.title)}</h2>", html_table(table)]
    parts += write_examples(results.get("items", []))
    parts += ["<h2>How it was run</h2>", html_json(results, _HOW)]
    return html_page("Evaluation", parts)


def headline(results: Record) -> str:
    """The announcement's pair for every mode but ar, in a sentence each."""
    sentences = []
    for mode, row in results["modes"].items():
        if mode == "ar" or row["retention"] is None:
            continue
        rate = row["tokens_per_nfe"]
        passes = "" if rate is None else f", {rate:.2f} tokens/NFE"
        speed = row["speed_ratio"]
        times = "" if speed is None else f" at {speed:.2f} times its speed"
        sentences.append(
            f"{mode} keeps {percent(row['retention'])} % of the AR quality (95 %: "
            f"{percent_range(row['retention_interval'])}){times}{passes}."
        )
    is_compared = {"ar"} < results["modes"].keys()
    why = "No answer of ar is right" if is_compared else "No mode was compared with ar"
    return " ".join(sentences) or f"{why}, so there is no retention."


def tables(results: Record, digits: int) -> list[Table]:
    """All categories together, each one, the sweep, the likelihoods; ranges with so many digits."""
    found = [mode_table("all", results["modes"], digits)]
    found += [mode_table(name, row, digits) for name, row in results["categories"].items()]
    if results.get("sweep"):
        found.append(sweep_table(results["sweep"]))
    if results.get("likelihood") is not None:
        found.append(likelihood_table(results["likelihood"]))
    return found


def mode_table(name: str, measured: Mapping[str, Record], digits: int) -> Table:
    """Accuracy with its interval, retention, passes and speed of every mode."""
    rows = [
        [
            mode,
            percent(row["accuracy"]),
            percent_range(row["interval"], digits),
            percent(row["retention"]),
            percent_range(row["retention_interval"], digits),
            number(row["same_as_ar"], 0),
            number(row["tokens_per_nfe"]),
            str(row["nfe"]),
            number(row["tokens_per_forward"]),
            number(row["tokens_per_s"], 0),
            number(row["speed_ratio"]),
            str(row["degenerate"]),
        ]
        for mode, row in measured.items()
    ]
    items = next(iter(measured.values()))["n"]
    return Table(f"{name} ({items} items)", _MODE_COLUMNS, rows)


def sweep_table(points: Sequence[Record]) -> Table:
    """Quality and speed of diffusion at each threshold, then at each limit of passes."""
    rows = [
        [
            f"{point['confidence_threshold']:g}",
            number(point["steps_per_block"], 0),
            percent(point["accuracy"]),
            percent(point.get("retention")),
            number(point["tokens_per_nfe"]),
            number(point.get("tokens_per_s"), 0),
            number(point["speed_ratio"]),
        ]
        for point in points
    ]
    return Table(f"diffusion with other settings ({points[0]['n']} items)", _SWEEP_COLUMNS, rows)


def likelihood_table(likelihood: Record) -> Table:
    """Nats per token of the reference answers: the context tower's, the denoiser's bound."""
    keys = ("ar_nats_per_token", "bound_nats_per_token", "bound_standard_error")
    rows = [
        [name, str(row["tokens"]), *[number(row[key], 4) for key in keys]]
        for name, row in {**likelihood["categories"], "all": likelihood["all"]}.items()
    ]
    title = f"likelihood of the reference answers ({likelihood['noisings']} noisings a block)"
    return Table(title, _LIKELIHOOD_COLUMNS, rows)


def write_examples(items: Sequence[Record]) -> list[str]:
    """Foldable lists of prompt, expected and written text by category; nothing without items."""
    if not items:
        return []
    parts = [
        "<h2>Examples</h2>",
        "<p>Prompt, expected answer and what each mode wrote; click to open. "
        "All items are in results.json.</p>",
    ]
    for category in dict.fromkeys(item["category"] for item in items):
        mine = [item for item in items if item["category"] == category]
        for kind, limit in SHOWN.items():
            chosen = [item for item in mine if kind_of(item) == kind]
            if chosen:
                parts.append(_fold(f"{category}: {kind}", chosen, len(mine), limit))
    return parts


def kind_of(item: Record) -> str:
    """Which of the kinds of `SHOWN` an item is."""
    right = {bool(output["correct"]) for output in item["outputs"].values()}
    if len(right) == 2:
        return "modes disagree"
    return "right in every mode" if True in right else "wrong in every mode"


def _fold(title: str, chosen: Sequence[Record], total: int, limit: int) -> str:
    cut = f", first {limit} shown" if len(chosen) > limit else ""
    summary = f"<summary>{escape(title)}: {len(chosen)} of {total} items{cut}</summary>"
    body = "\n".join(_example(item) for item in chosen[:limit])
    return f"<details>{summary}\n{body}</details>"


def _example(item: Record) -> str:
    prompt = item["prompt"]
    if len(prompt) > PROMPT_CHARS:
        prompt = "... " + prompt[-PROMPT_CHARS:]
    lines = [
        f"<h3>{escape(item['category'])} {item['index']}</h3>",
        f"<p>prompt</p><pre>{escape(prompt)}</pre>",
        f"<p>expected</p><pre>{escape(item['reference'])}</pre>",
    ]
    for mode, output in item["outputs"].items():
        kind = "right" if output["correct"] else "wrong"
        note = f"wrong: {output['reason']}" if output["reason"] else kind
        passes = f", {output['nfe']} NFE" if output["nfe"] else ""
        lines.append(f"<p>{escape(mode)} ({escape(note)}{passes})</p>")
        lines.append(f"<pre class='{kind}'>{escape(output['text'])}</pre>")
    return "\n".join(lines)


def figures(results: Record) -> dict[str, "Figure"]:
    """Every picture that the record has data for, by the name of its file."""
    makers = {
        "retention": plot_retention,
        "tradeoff": plot_tradeoff,
        "steps_by_block": plot_steps_by_block,
        "commit_order": plot_commit_order,
    }
    made = {name: maker(results) for name, maker in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def plot_retention(results: Record) -> "Figure | None":
    """Quality kept by category, with its interval, for every mode but ar."""
    modes = [mode for mode in results["modes"] if mode != "ar"]
    rows = {**results["categories"], "all": results["modes"]}
    rows = {n: m for n, m in rows.items() if modes and m[modes[0]]["retention"] is not None}
    if not rows:
        return None
    figure, axes = new_axes(1.4 + 0.4 * len(rows))
    for place, mode in enumerate(modes):
        for at, (_, measured) in enumerate(reversed(rows.items())):
            low, high = measured[mode]["retention_interval"]
            height = at + 0.2 * (place - (len(modes) - 1) / 2)
            axes.plot([100 * low, 100 * high], [height, height], color=COLORS[place], linewidth=2)
            label = mode if at == 0 else None
            kept = 100 * measured[mode]["retention"]
            axes.plot([kept], [height], "o", color=COLORS[place], label=label)
    axes.axvline(98.7, color="gray", linestyle="--", linewidth=1)
    low = axes.get_xaxis_transform()
    axes.text(98.7, 0.01, "98.7 % ", transform=low, ha="right", fontsize=8, color="gray")
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_xlabel("accuracy kept of ar, %, with its 95 % interval")
    n = next(iter(results["categories"].values()))[modes[0]]["n"]
    axes.set_title(f"Quality kept, {n} items a category")
    axes.legend()
    return figure


def plot_tradeoff(results: Record) -> "Figure | None":
    """Accuracy against tokens per pass and against speed as threshold and pass limit vary."""
    points: Sequence[Record] = results.get("sweep", [])
    if not points:
        return None
    costs = {
        "tokens_per_nfe": "tokens per denoiser pass (tokens/NFE)",
        "speed_ratio": "speed, times that of ar (median over prompts)",
    }
    measured = [cost for cost in costs if all(p.get(cost) is not None for p in points)]
    if not measured:
        return None
    figure = new_figure(width=5.5 * len(measured), height=4.2)
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, measured, strict=True):
        draw_sweep(axes, points, cost)
        axes.set_xlabel(costs[cost])
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend()
    figure.suptitle(f"Quality against passes and speed, {points[0]['n']} items; dashed: ar")
    return figure


def draw_sweep(axes: "Axes", points: Sequence[Record], cost: str) -> None:
    """Two lines through the points: the threshold varies, and the limit of passes."""
    for color, by, label in (
        (COLORS[0], "confidence_threshold", "threshold varies"),
        (COLORS[1], "steps_per_block", "passes per block limited"),
    ):
        is_limit = by == "steps_per_block"
        varied = [p for p in points if (p["steps_per_block"] is not None) == is_limit]
        places = [(p[cost], 100 * p["accuracy"]) for p in varied]
        axes.plot(*zip(*places, strict=True), "o-", color=color, label=label)
        for place, text in point_labels(places, [f"{p[by]:g}" for p in varied]).items():
            # Limits below the line, thresholds above: the two often meet in a point.
            shift = (4, -11 if is_limit else 4)
            axes.annotate(text, place, textcoords="offset points", xytext=shift, fontsize=8)
    baseline = points[0].get("ar_accuracy")
    if baseline is not None:
        axes.axhline(100 * baseline, color="gray", linestyle="--", linewidth=1)


def point_labels(
    places: Sequence[tuple[float, float]], names: Sequence[str]
) -> dict[tuple[float, float], str]:
    """The text at each place of a picture; names that stand at the same one share it."""
    labels: dict[tuple[float, float], list[str]] = {}
    for (across, up), name in zip(places, names, strict=True):
        labels.setdefault((round(across, 2), round(up, 2)), []).append(name)
    return {place: ", ".join(shared) for place, shared in labels.items()}


def plot_steps_by_block(results: Record) -> "Figure | None":
    """Mean passes of the first, second, ... block of an answer."""
    traces = results.get("traces", {})
    if not traces:
        return None
    figure, axes = new_axes()
    width = 0.8 / len(traces)
    for place, (mode, trace) in enumerate(traces.items()):
        at = [number + place * width for number in range(len(trace["steps_by_block"]))]
        bars = axes.bar(at, trace["steps_by_block"], width, color=COLORS[place], label=mode)
        axes.bar_label(bars, [f"n={n}" for n in trace["blocks"]], fontsize=7)
    axes.set_xlabel("block of the answer, from 0")
    axes.set_ylabel("denoiser passes, mean")
    axes.set_title("Passes by block")
    axes.legend()
    return figure


def plot_commit_order(results: Record) -> "Figure | None":
    """Mean pass in which each position of a block was committed."""
    traces = results.get("traces", {})
    if not traces:
        return None
    figure, axes = new_axes()
    for place, (mode, trace) in enumerate(traces.items()):
        tau = trace["kendall_tau"]
        label = mode if tau is None else f"{mode}, Kendall tau {tau:.2f}"
        axes.plot(trace["commit_step_by_position"], "o-", color=COLORS[place], label=label)
    axes.set_xlabel("position in the block, from 0")
    axes.set_ylabel("pass of its commit, mean")
    axes.set_title("Commit order (tau 1: left to right)")
    axes.legend()
    return figure
