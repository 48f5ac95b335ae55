"""`twotower train`: one training run, from flags and optionally a TOML file."""

import logging
import sys
import tomllib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.progress import TaskID

from twotower.cli.flags import by_field, name_flags, spellings
from twotower.cli.progress import progress_bar
from twotower.train.loop import StepReport, train_steps
from twotower.train.options import TrainOptions, check_values
from twotower.train.processes import ALONE, LostProcess, Processes, SharedError, joined


def run(options: TrainOptions) -> int:
    """Train until done or stopped, alone or as one of torchrun's processes; returns the exit
    status. Errors of the user arrive as ValueError, or are printed by the first process.
    """
    processes = ALONE
    try:
        with joined(options.device, options.peer_timeout_s) as processes:
            try:
                return _train(options, processes)
            except SharedError as error:
                if processes.is_first:
                    text = name_flags(str(error), TrainOptions, ())
                    print(f"error: {text}", file=sys.stderr, flush=True)
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
        for report in train_steps(options, processes):
            if progress is not None:
                progress.update(report)
    folder = options.run_folder
    if not processes.is_first:
        return 0
    if report is not None and report.step < report.steps:
        print(f"{folder}: saved at step {report.step} of {report.steps}; run it again to resume")
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
    try:
        values = by_field(values, spellings(TrainOptions))
        check_values(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    arguments: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parts: Sequence[object] = value if isinstance(value, list) else [value]
            arguments += [f"--{flag}", *map(str, parts)]
    return arguments


class TrainProgress:
    """Draws step reports on stderr: a live bar in a terminal, plain lines elsewhere."""

    def __init__(self, description: str) -> None:
        self._bar = progress_bar("status", has_time=False)
        self._description = description
        self._task: TaskID | None = None

    def update(self, report: StepReport) -> None:
        """Show one step; validation losses stay on the screen as a line of their own."""
        if self._task is None:
            self._task = self._bar.add_task(self._description, total=report.steps, status="")
        self._bar.update(self._task, completed=report.step, status=status_text(report))
        if report.validation_loss is not None:
            self._print(f"step {report.step}: validation loss {report.validation_loss:.4f}")
        if report.is_logged and self._bar.disable:
            self._print(f"step {report.step}/{report.steps}  {status_text(report)}")

    def _print(self, line: str) -> None:
        self._bar.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def __enter__(self) -> "TrainProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def status_text(report: StepReport) -> str:
    """loss, speed and time left, e.g. "loss 2.3456  3.1k tok/s  ETA 0:12:05"."""
    minutes, seconds = divmod(round(report.eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    speed = report.tokens_per_s
    tokens = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    return f"loss {report.loss:.4f}  {tokens} tok/s  ETA {hours}:{minutes:02}:{seconds:02}"


def read_toml(file: Path) -> dict[str, object]:
    """Field values from a TOML file, names as in TrainOptions (dashes are accepted)."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--options: cannot read {file} ({error.strerror}); check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--options: {file} is not TOML ({error}); correct it") from error
    return {name.replace("-", "_"): value for name, value in content.items()}
