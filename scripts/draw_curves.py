"""Draw the losses of training runs, one below the other, from their metrics.jsonl.

Thin: the mean training loss since the last line; dots: validation loss on held-out rows. Grey: the
learning rate, as a share of its peak. Usage: python scripts/draw_curves.py OUT.svg TITLE=FILE ...
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from twotower.train.run_folder import read_metrics


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or not all("=" in run for run in arguments[1:]):
        raise SystemExit("usage: python scripts/draw_curves.py OUT.svg TITLE=metrics.jsonl ...")
    out, *runs = arguments
    figure, rows = pyplot.subplots(len(runs), figsize=(8, 2.6 * len(runs)), squeeze=False)
    for axes, run in zip(rows[:, 0], runs, strict=True):
        title, file = run.split("=", 1)
        draw(axes, title, Path(file))
    figure.tight_layout()
    pyplot.rcParams["svg.hashsalt"] = "twotower"  # the same file for the same runs
    figure.savefig(out, metadata={"Date": None} if out.endswith(".svg") else None)


def draw(axes: Axes, title: str, file: Path) -> None:
    lines = read_metrics(file)
    logged = [line for line in lines if "loss" in line]
    measured = [line for line in lines if "validation_loss" in line]
    axes.plot(column(logged, "step"), column(logged, "loss"), linewidth=0.8, label="training")
    axes.plot(
        column(measured, "step"), column(measured, "validation_loss"), "o-", markersize=4,
        label="held-out rows",
    )  # fmt: skip
    axes.set(title=title, xlabel="step", ylabel="nats a token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    rates = column(logged, "learning_rate")
    right = axes.twinx()
    right.plot(column(logged, "step"), [rate / max(rates) for rate in rates], "0.7", linewidth=0.8)
    right.set(ylabel="rate / peak", ylim=(0, 1.05))
    axes.legend()


def column(lines: list[dict[str, float]], name: str) -> list[float]:
    return [line[name] for line in lines]


if __name__ == "__main__":
    main(sys.argv[1:])
