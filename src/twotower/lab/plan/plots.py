"""Pictures of a plan's record, each a matplotlib figure; a part that is missing gives none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twotower.lab.evaluate.plots import COLORS, new_figure
from twotower.lab.plan.workload import MODES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
_FAR = 10  # times the fullest device
_KINDS = ("dense", "experts", "cache", "activations")


def plan_figures(record: Record) -> dict[str, Figure]:
    """Every picture that the record has data for, by the name of its file."""
    made = {
        "speed": plot_speed(record),
        "break_even": plot_break_even(record),
        "memory": plot_memory(record),
        "passes": plot_passes(record),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def plot_speed(record: Record) -> Figure | None:
    """Tokens a second by rows at a time, a line per mode."""
    if not record["sweep"]:
        return None
    figure = new_figure()
    axes = figure.add_subplot()
    for color, mode in zip(COLORS, MODES, strict=False):
        points = [(p["batch"], p["modes"][mode]) for p in record["sweep"]]
        kept = [(batch, found["tokens_per_s"]) for batch, found in points if found]
        if kept:
            axes.plot(*zip(*kept, strict=True), "o-", color=color, label=mode)
    axes.set_xscale("log", base=2)
    batches = [point["batch"] for point in record["sweep"]]
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_yscale("log")
    axes.axvline(record["workload"]["batch"], color="gray", linestyle="--", linewidth=1)
    axes.set_xlabel("rows at a time, at most; dashed: the batch asked for")
    axes.set_ylabel("tokens/s, prompts included")
    axes.set_title("Speed by batch")
    axes.legend()
    return figure


def plot_break_even(record: Record) -> Figure | None:
    """Speed-up of diffusion over AR, decoding alone, against tokens per pass."""
    even, passes = record["break_even"], record["passes"]
    if even is None:
        return None
    work = record["workload"]
    reads = -(-work["new_tokens"] // work["block_size"]) - 1
    read_ms = even["read_ms"] * reads
    figure = new_figure()
    axes = figure.add_subplot()
    ar_ms = passes["ar_step"]["ms"] * (work["new_tokens"] - 1)
    at = [1 + 0.25 * i for i in range(4 * (work["block_size"] - 1) + 1)]
    cost = [work["new_tokens"] / k * passes["denoise_pass"]["ms"] + read_ms for k in at]
    axes.plot(at, [ar_ms / ms for ms in cost], color=COLORS[1])
    for height, label in ((1.0, "AR"), (2.42, "2.42, the announcement")):
        axes.axhline(height, color="gray", linestyle="--", linewidth=1)
        axes.annotate(label, (at[-1], height), ha="right", va="bottom", fontsize=8, color="gray")
    axes.axvline(work["tokens_per_nfe"], color="gray", linestyle=":", linewidth=1)
    axes.set_xlabel("tokens per denoiser pass; dotted: assumed here")
    axes.set_ylabel("times the speed of AR")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Break-even at batch {work['batch']}")
    return figure


def plot_memory(record: Record) -> Figure:
    """What each device holds in each mode, against what it offers."""
    bars = []
    for mode, found in record["modes"].items():
        for number, device in enumerate(found["placement"]["devices"]):
            towers = " + ".join(device["towers"])
            bars.append((f"{mode}, device {number}: {towers}", device))
    figure = new_figure(height=1.6 + 0.45 * len(bars))
    axes = figure.add_subplot()
    most = max(device["total"] for _, device in bars)
    name, unit = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    left = [0.0] * len(bars)
    for color, kind in zip(COLORS, _KINDS, strict=False):
        widths = [device[kind] / unit for _, device in bars]
        axes.barh([label for label, _ in bars], widths, left=left, color=color, label=kind)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    usable = record["memory"]["usable_bytes_per_device"]
    axes.set_xlabel(f"{name}; a device offers {usable / unit:,.0f}")
    if usable <= _FAR * most:  # else the line would leave no room for the bars
        axes.axvline(usable / unit, color="gray", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_title("Memory")
    figure.legend(loc="outside lower center", ncols=len(_KINDS), fontsize=8)
    return figure


def plot_passes(record: Record) -> Figure | None:
    """Milliseconds of each pass and what they go to."""
    passes = record["passes"]
    if not passes:
        return None
    figure = new_figure(height=1.6 + 0.45 * len(passes))
    axes = figure.add_subplot()
    left = [0.0] * len(passes)
    parts = {"overhead": "overhead_ms", "bandwidth": "stream_ms", "arithmetic": "compute_ms"}
    for color, (label, key) in zip(COLORS, {**parts, "host link": "host_ms"}.items(), strict=False):
        widths = [found[key] for found in passes.values()]
        axes.barh(list(passes), widths, left=left, color=color, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms a pass, all rows")
    axes.set_title("Where the time of a pass goes")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure
