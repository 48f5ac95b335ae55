"""The picture of a stage: a PNG beside its record, renewed as that grows."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.lab.report import to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
RENEWED_EVERY_S = 10.0  # drawing takes up to a second of the stage's time


class Picture:
    """What `paint` makes of a record; a line and no picture where matplotlib is not installed."""

    def __init__(self, file: Path, paint: Callable[[Record], "Figure"]) -> None:
        """paint: a figure of its own for each call, from a record with results."""
        self._file, self._paint = file, paint
        self._drawn_s = time.monotonic()
        self._is_possible = True

    def renew(self, record: Record, *, is_forced: bool = False) -> None:
        """Draw the record if the last picture is old or `is_forced`; the title says where."""
        is_due = is_forced or time.monotonic() - self._drawn_s > RENEWED_EVERY_S
        if not (self._is_possible and is_due and record["results"]):
            return
        try:
            figure = self._paint(record)
        except ImportError as error:
            self._is_possible = False
            print(f"no picture is drawn: {error}")
            return
        machine = record["machine"]
        where = f"GPU: {machine['gpu']}, torch {machine['torch']}"
        figure.suptitle(f"{figure.get_suptitle()}\n{where}")
        write_whole(self._file, to_png(figure))
        self._drawn_s = time.monotonic()


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file, or leave it as it was."""
    aside = file.with_suffix(".tmp")
    aside.write_bytes(content)
    aside.replace(file)
