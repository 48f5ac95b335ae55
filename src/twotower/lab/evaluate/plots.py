"""Pictures of a results record, each a matplotlib figure; a part that is missing gives none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Record = Mapping[str, Any]


def new_figure(width: float = 7.0, height: float = 3.8) -> Figure:
    """An empty figure that no global state knows; ImportError says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = 'matplotlib is not installed: pip install "twotower[eval]"'
        raise ImportError(message) from None
    return Figure(figsize=(width, height), layout="constrained")


def figures(results: Record) -> dict[str, Figure]:
    """Every picture that the record has data for, by the name of its file."""
    makers = {
        "retention": plot_retention,
        "tradeoff": plot_tradeoff,
        "steps_by_block": plot_steps_by_block,
        "commit_order": plot_commit_order,
    }
    made = {name: maker(results) for name, maker in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def plot_retention(results: Record) -> Figure | None:
    """Quality kept by category, with its interval, for every mode but ar."""
    modes = [mode for mode in results["modes"] if mode != "ar"]
    rows = {**results["categories"], "all": results["modes"]}
    rows = {n: m for n, m in rows.items() if modes and m[modes[0]]["retention"] is not None}
    if not rows:
        return None
    figure = new_figure(height=1.4 + 0.4 * len(rows))
    axes = figure.add_subplot()
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


def plot_tradeoff(results: Record) -> Figure | None:
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


def draw_sweep(axes: Axes, points: Sequence[Record], cost: str) -> None:
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


def plot_steps_by_block(results: Record) -> Figure | None:
    """Mean passes of the first, second, ... block of an answer."""
    traces = {m: t for m, t in results.get("traces", {}).items() if t}
    if not traces:
        return None
    figure = new_figure()
    axes = figure.add_subplot()
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


def plot_commit_order(results: Record) -> Figure | None:
    """Mean pass in which each position of a block was committed."""
    traces = {m: t for m, t in results.get("traces", {}).items() if t}
    if not traces:
        return None
    figure = new_figure()
    axes = figure.add_subplot()
    for place, (mode, trace) in enumerate(traces.items()):
        tau = trace["kendall_tau"]
        label = mode if tau is None else f"{mode}, Kendall tau {tau:.2f}"
        axes.plot(trace["commit_step_by_position"], "o-", color=COLORS[place], label=label)
    axes.set_xlabel("position in the block, from 0")
    axes.set_ylabel("pass of its commit, mean")
    axes.set_title("Commit order (tau 1: left to right)")
    axes.legend()
    return figure
