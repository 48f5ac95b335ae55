"""`twotower train`: one training run, from flags and optionally a TOML file."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from twotower.train.loop import train
from twotower.train.options import TrainOptions, read_toml
from twotower.train.progress import TrainProgress


def run(options: TrainOptions) -> int:
    """Train until done or stopped; returns the exit status. Errors of the user arrive as
    ValueError.
    """
    logging.getLogger("twotower").setLevel(logging.INFO)
    report = None
    with TrainProgress(options.recipe) as progress:
        for report in train(options):
            progress.update(report)
    folder = options.run_folder
    if report is not None and report.step < report.steps:
        print(f"{folder}: saved at step {report.step} of {report.steps}; run it again to go on")
    else:
        print(f"{folder}: {options.steps} steps done; the model is in {folder / 'export'}")
    return 0


def arguments_from_toml(file: Path) -> list[str]:
    """A TOML file of options as flags, to be put before the command line's own, which then win.

    Names and values are checked as options first: ValueError names the nearest option for an
    unknown one.
    """
    values = read_toml(file)
    TrainOptions.check_values(values)
    arguments: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parts: Sequence[object] = value if isinstance(value, list) else [value]
            arguments += [f"--{flag}", *map(str, parts)]
    return arguments


if __name__ == "__main__":
    import tyro

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        sys.exit(run(tyro.cli(TrainOptions)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
