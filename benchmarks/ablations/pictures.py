"""Pictures of the ablations' records; a record that is missing leaves its picture out."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from benchmarks.ablations.scoring import Record, compare
from benchmarks.ablations.variants import BASE, VARIANTS
from matplotlib.axes import Axes

from twotower.lab.report import COLORS, new_figure

MARKS = ("o", "s")
SIZES = (8, 16, 32, 64)


def draw(trained: Mapping[str, Record], sampled: Mapping[str, Record], folder: Path) -> list[Path]:
    """Write every picture that the records allow as a PNG into `folder`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    variants = {name: trained[name] for name in VARIANTS if name in trained}
    paths = [draw_variants(variants, folder), draw_curves(variants, folder)] if variants else []
    by_table = {
        table: {n: r for n, r in sampled.items() if table in r["tables"]}
        for table in ("blocks", "threshold", "seed")
    }
    if by_table["blocks"]:
        paths.append(draw_blocks(by_table["blocks"], folder))
    if by_table["seed"]:
        paths.append(draw_changes(by_table["seed"], folder))
    if by_table["threshold"]:
        paths.append(draw_thresholds(by_table["threshold"], folder))
    return paths


def draw_variants(trained: Mapping[str, Record], folder: Path) -> Path:
    """Accuracy at both thresholds (dashed: AR), and the bound minus the base's."""
    figure = new_figure(width=9.0, height=1.2 + 0.42 * len(trained))
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(reversed(trained))
    for place, mode in enumerate(("diffusion 0.8", "diffusion 0.95")):
        rows = [trained[name]["modes"][mode] for name in names]
        _ranges(left, rows, 0.2 * (0.5 - place), COLORS[place], MARKS[place], mode)
    limit = next(iter(trained.values()))["modes"]["ar"]["accuracy"]
    left.axvline(100 * limit, color="gray", linestyle="--", linewidth=1, label="AR of the backbone")
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("accuracy, %, with its 95 % interval")
    left.legend(fontsize=8)
    base = np.array(trained[BASE]["bounds"])
    for height, name in enumerate(names):
        gain, ends = compare(np.array(trained[name]["bounds"]), base)
        right.plot(ends, [height] * 2, color=COLORS[0], linewidth=1.5)
        right.plot([gain], [height], MARKS[0], color=COLORS[0], markersize=5)
    right.axvline(0.0, color="gray", linestyle="--", linewidth=1)
    right.set_xlabel("bound minus base's, nats/answer (less is better)")
    return _save(figure, folder / "variants.png")


def draw_curves(trained: Mapping[str, Record], folder: Path) -> Path:
    """Training loss by step. Other block sizes are other tasks: their losses do not compare."""
    figure = new_figure()
    axes = figure.add_subplot()
    for place, (name, record) in enumerate(trained.items()):
        if record["asked"]["options"]["block_size"] != 16 or name == "tied-ar":
            continue  # tied-ar's loss holds the next token's as well
        points = [line for line in record["curve"] if "validation_loss" in line]
        axes.plot(
            [line["step"] for line in points],
            [line["validation_loss"] for line in points],
            marker="o", markersize=3, color=COLORS[place % len(COLORS)],
            linestyle="-" if place < len(COLORS) else "--", label=name,
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss of the denoiser, nats")
    axes.legend(fontsize=8)
    return _save(figure, folder / "curves.png")


def draw_blocks(sampled: Mapping[str, Record], folder: Path) -> Path:
    """Accuracy by sampling block size, with intervals; each model's AR as a dashed line."""
    figure = new_figure(height=3.4)
    axes = figure.add_subplot()
    for place, (name, record) in enumerate(sampled.items()):
        rows = [record["modes"][f"block {size}"] for size in SIZES]
        color = COLORS[place]
        axes.plot(SIZES, [100 * row["accuracy"] for row in rows], "o-", color=color, label=name)
        lows, highs = ([100 * row["interval"][end] for row in rows] for end in (0, 1))
        axes.fill_between(SIZES, lows, highs, color=color, alpha=0.2)
        limit = 100 * record["modes"]["ar"]["accuracy"]
        axes.axhline(limit, color=color, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens per block in sampling (trained: 16)")
    axes.set_ylabel("accuracy, %; dashed: AR")
    axes.legend(fontsize=8)
    return _save(figure, folder / "sampling-blocks.png")


def draw_changes(sampled: Mapping[str, Record], folder: Path) -> Path:
    """Accuracy under every intervention and commit rule, with intervals."""
    wanted = ("seed", "t", "remask")
    first = next(iter(sampled.values()))["tables"]
    names = ["ar", "diffusion", *[n for table in wanted for n in first.get(table, [])]]
    figure = new_figure(height=1.2 + 0.3 * len(names))
    axes = figure.add_subplot()
    names.reverse()
    for place, (name, record) in enumerate(sampled.items()):
        rows = [record["modes"].get(setting) for setting in names]
        _ranges(axes, rows, 0.2 * (0.5 - place), COLORS[place], MARKS[place % 2], name)
    axes.set_yticks(range(len(names)), ["control" if n == "diffusion" else n for n in names])
    axes.set_xlabel("accuracy, %, with its 95 % interval")
    axes.legend(fontsize=8)
    return _save(figure, folder / "sampling-changes.png")


def draw_thresholds(sampled: Mapping[str, Record], folder: Path) -> Path:
    """Accuracy against tokens per pass as the threshold varies."""
    figure = new_figure(height=3.4)
    axes = figure.add_subplot()
    for place, (name, record) in enumerate(sampled.items()):
        settings = record["tables"].get("threshold", [])
        rows = [record["modes"][setting] for setting in settings]
        passes = [row["tokens_per_nfe"] for row in rows]
        right = [100 * row["accuracy"] for row in rows]
        axes.plot(passes, right, "o-", color=COLORS[place], label=name)
        for setting, at in zip(settings, zip(passes, right, strict=True), strict=True):
            text = setting.removeprefix("threshold ")
            axes.annotate(text, at, textcoords="offset points", xytext=(4, 4), fontsize=8)
        limit = 100 * record["modes"]["ar"]["accuracy"]
        axes.axhline(limit, color=COLORS[place], linestyle="--", linewidth=1)
    axes.set_xlabel("tokens per denoiser pass (tokens/NFE)")
    axes.set_ylabel("accuracy, %; dashed: AR")
    axes.legend(fontsize=8)
    return _save(figure, folder / "thresholds.png")


def _ranges(
    axes: Axes, rows: list[Record | None], shift: float, color: str, mark: str, label: str
) -> None:
    """A point with its interval per row, from the bottom; rows of None are left out."""
    for height, row in enumerate(rows):
        if row is not None:
            low, high = (100 * bound for bound in row["interval"])
            axes.plot([low, high], [height + shift] * 2, color=color, linewidth=1.5)
    found = [(100 * row["accuracy"], at + shift) for at, row in enumerate(rows) if row is not None]
    axes.plot(*zip(*found, strict=True), mark, color=color, markersize=5, label=label)


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return path
