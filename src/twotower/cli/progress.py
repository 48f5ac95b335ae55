"""A live bar on stderr, shown only at a terminal."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def progress_bar(*fields: str, has_count: bool = True, has_time: bool = True) -> Progress:
    """Description, bar, how many of how many, fields of the task, and the time left."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    columns += [MofNCompleteColumn()] if has_count else []
    columns += [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    columns += [TimeRemainingColumn()] if has_time else []
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)
