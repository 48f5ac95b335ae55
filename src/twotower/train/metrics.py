"""The record of a run: one JSON line per measurement, and the same numbers for TensorBoard.

A resumed run drops the lines after its checkpoint first, so that every step is recorded once.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)


class Metrics:
    """Appends measurements; a context manager that closes its files."""

    def __init__(self, file: Path, tensorboard: Path | None, step: int) -> None:
        """Continue `file` after `step`, dropping later lines. `tensorboard` None: no such log."""
        _drop_after(file, step)
        self._stream = file.open("a", encoding="utf-8")
        self._writer = None if tensorboard is None else _open_tensorboard(tensorboard, step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record `values` of optimiser step `step` (1 = after the first)."""
        self._stream.write(json.dumps({"step": step} | values) + "\n")
        self._stream.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """All complete lines; a line that a kill cut short is left out."""
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            lines.append(json.loads(line))
    return lines


def _drop_after(file: Path, step: int) -> None:
    kept = [line for line in read_metrics(file) if line["step"] <= step]
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(file)


def _open_tensorboard(folder: Path, step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning(
            "no TensorBoard log: the library is missing; for one, pip install 'twotower[train]'"
        )
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
