"""A live bar on stderr, shown only at a terminal."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from twotower.loading import Loaded, Placement, load

_SHOWN_AFTER_S = 1.0  # of loading


def progress_bar(
    *fields: str, has_count: bool = True, has_time: bool = True, is_kept: bool = True
) -> Progress:
    """Description, bar, how many of how many, fields of the task, and the time left. is_kept:
    whether it stays there when all is done.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
    columns += [MofNCompleteColumn()] if has_count else []
    columns += [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    columns += [TimeRemainingColumn()] if has_time else []
    console = Console(stderr=True)
    is_hidden = not console.is_terminal
    return Progress(*columns, console=console, disable=is_hidden, transient=not is_kept)


def load_with_bar(
    placement: Placement, mode: str | None = None, only_decodes: bool = False
) -> Loaded:
    """As `twotower.loading.load`, with a bar once it takes long."""
    began, bar = time.monotonic(), progress_bar(has_count=False, is_kept=False)
    task = bar.add_task(f"loading {placement.name}", total=1.0)

    def show(share: float) -> None:
        bar.update(task, completed=share)
        if time.monotonic() - began > _SHOWN_AFTER_S:
            bar.start()

    try:
        return load(placement, mode, show, only_decodes)
    finally:
        if bar.live.is_started:
            bar.stop()
        bar.disable = True  # a packed model's values may be read again
