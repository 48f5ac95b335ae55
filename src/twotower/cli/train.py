"""`twotower train`: one training run, from flags and optionally a TOML file."""

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from twotower.train.loop import train
from twotower.train.options import TrainOptions, read_toml
from twotower.train.processes import ALONE, LostProcess, Processes, SharedError, joined
from twotower.train.progress import TrainProgress


def run(options: TrainOptions) -> int:
    """Train until done or stopped, alone or as one of torchrun's processes; returns the exit
    status. Errors of the user arrive as ValueError, or are told by the first process.
    """
    processes = ALONE
    try:
        with joined(options.device, options.peer_timeout_s) as processes:
            try:
                return _train(options, processes)
            except SharedError as error:
                if processes.is_first:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                processes.wait_for_all()  # torchrun stops the others as soon as one is gone
                return 2
            except ValueError as error:
                raise ValueError(f"{_place(processes)}{error}") from error
    except LostProcess as error:
        print(f"error: {_place(processes)}{error}", file=sys.stderr, flush=True)
        return 1


def _train(options: TrainOptions, processes: Processes) -> int:
    logging.getLogger("twotower").setLevel(logging.INFO if processes.is_first else logging.ERROR)
    report = None
    with TrainProgress(options.recipe) if processes.is_first else nullcontext() as progress:
        for report in train(options, processes):
            if progress is not None:
                progress.update(report)
    folder = options.run_folder
    if not processes.is_first:
        return 0
    if report is not None and report.step < report.steps:
        print(f"{folder}: saved at step {report.step} of {report.steps}; run it again to go on")
    else:
        print(f"{folder}: {options.steps} steps done; the model is in {folder / 'export'}")
    return 0


def _place(processes: Processes) -> str:
    """Who speaks, where there are several."""
    return "" if processes.count == 1 else f"process {processes.rank}: "


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
