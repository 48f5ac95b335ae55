"""What training shows: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from twotower.train.loop import StepReport


class TrainProgress:
    """Draws step reports on stderr; a context manager."""

    def __init__(self, description: str) -> None:
        self._console = Console(stderr=True)
        self._is_live = self._console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._is_live,
        )
        self._description = description
        self._task: TaskID | None = None

    def update(self, report: StepReport) -> None:
        """Show one step; validation losses stay on the screen as a line of their own."""
        if self._task is None:
            self._task = self._bar.add_task(self._description, total=report.steps, status="")
        self._bar.update(self._task, completed=report.step, status=status_text(report))
        if report.validation_loss is not None:
            self._print(f"step {report.step}: validation loss {report.validation_loss:.4f}")
        if report.is_logged and not self._is_live:
            self._print(f"step {report.step}/{report.steps}  {status_text(report)}")

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def __enter__(self) -> TrainProgress:
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
