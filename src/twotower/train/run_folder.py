"""What a run leaves on disk: options.json, versions.json, metrics.jsonl, checkpoints/, export/.

Decides how a checkpoint gets its place (aside, synced, then renamed: a kill at any instant leaves
whole ones), which of them a resumed run takes and which options it may change. What a checkpoint
holds is `state`'s business.
"""

import json
import logging
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from twotower.train.options import TrainOptions
from twotower.train.processes import Processes
from twotower.train.state import (
    Checkpoint,
    TrainState,
    read_checkpoint,
    write_description,
    write_part,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"step-(\d{8,})")
_LIBRARIES = ("twotower", "torch", "numpy", "tokenizers", "safetensors", "tensorboard")
# Another value of these would make another run of it, not a continued one.
_FIXED = (
    "recipe", "seed", "sequence_length", "unaligned_row_fraction", "init", "preset", "config",
    "block_size", "towers", "train_context", "ar_loss_weight", "bidirectional_mamba",
    "denoiser_init", "reads", "denoiser", "bigram_rank", "condition_on", "optimizer", "ema_decay",
    "early_block_size", "early_fraction",
)  # fmt: skip
# These change nothing that is learnt.
_UNTOLD = (
    "data", "output", "steps", "device", "threads", "compile", "activation_checkpointing",
    "backend", "peer_timeout_s", "resume", "checkpoint_every", "keep_checkpoints", "log_every",
    "eval_every", "eval_rows", "tensorboard",
)  # fmt: skip


class RunFolder:
    """Paths, options and checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"

    def open(self, options: TrainOptions) -> Checkpoint | None:
        """Create the folder, or find the checkpoint to continue from; records options and versions.

        ValueError if the folder belongs to another run, or to any run without `resume`.
        """
        existing = self.steps()
        if existing and not options.resume:
            raise ValueError(
                f"output: {self.path} holds a run at step {existing[-1]}; use a new folder, or "
                "leave out resume=False"
            )
        found = self._read_newest(existing) if existing else None
        if found is not None:
            self._check_same_run(options, found.step)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        _write_json(self.path / "options.json", options.to_dict())
        _write_json(self.path / "versions.json", versions())
        return found

    def save(
        self, state: TrainState, rows_fingerprint: str, keep: int, processes: Processes
    ) -> None:
        """Write a checkpoint from all processes, then delete all but the newest `keep`.

        All must see the same file system. ValueError (one line) if it cannot be written.
        """
        partial, rank, count = self.partial(state.step), processes.rank, processes.count
        try:
            processes.on_first(lambda: _make_empty(partial))
            processes.together(lambda: write_part(partial, state, rank, count))
            processes.on_first(lambda: write_description(partial, state, rows_fingerprint))
            processes.on_first(lambda: _move(partial, self.checkpoint(state.step)))
        except (OSError, ValueError) as error:
            processes.on_first(lambda: shutil.rmtree(partial, ignore_errors=True))
            reason = " ".join(str(error).split())
            raise processes.error(
                f"checkpoint: cannot write {partial} ({reason}); earlier checkpoints are whole: "
                "free some space and run the same command again"
            ) from error
        processes.on_first(lambda: self.drop_all_but(keep))

    def drop_all_but(self, keep: int) -> None:
        """Delete all checkpoints but the newest `keep`, and what a kill left of others."""
        for step in self.steps()[:-keep]:
            # Half of a folder must not look like a whole one.
            self.checkpoint(step).rename(self.partial(step))
        for partial in self.checkpoints.glob("step-*.partial"):
            shutil.rmtree(partial)

    def newest(self) -> Path | None:
        """The newest checkpoint, if any."""
        steps = self.steps()
        return self.checkpoint(steps[-1]) if steps else None

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Where it is written before it gets its name."""
        return self.checkpoint(step).with_suffix(".partial")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = (_CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.glob("step-*"))
        return sorted({int(match[1]) for match in found if match})

    def _read_newest(self, steps: list[int]) -> Checkpoint:
        for step in reversed(steps):
            try:
                return read_checkpoint(self.checkpoint(step))
            except ValueError as error:
                _log.warning("%s; trying the one before", error)
        raise ValueError(
            f"output: no checkpoint in {self.checkpoints} can be read; use a new folder"
        )

    def _check_same_run(self, options: TrainOptions, step: int) -> None:
        """ValueError for options that contradict what was trained; other changes are logged."""
        before, now = self._options_before(), json.loads(json.dumps(options.to_dict()))
        changed = {name: value for name, value in now.items() if before[name] != value}
        for name in _FIXED:
            if name in changed:
                raise ValueError(
                    f"{name}: {now[name]} differs from {before[name]} of the run in {self.path}; "
                    "use that value, or another output folder"
                )
        if options.steps < step:
            raise ValueError(
                f"steps: {options.steps}, but the run in {self.path} is at step {step} already; "
                f"give {step} to export that, more to go on, or another output folder"
            )
        for name in changed.keys() - {*_UNTOLD}:
            _log.warning("%s: %s from step %d on, %s before", name, now[name], step, before[name])

    def _options_before(self) -> dict[str, object]:
        file = self.path / "options.json"
        try:
            before = json.loads(file.read_text())
            defaults = {field.name: field.default for field in fields(TrainOptions)}
            if "recipe" not in before:
                raise ValueError("it names no recipe")
            return {**defaults, **before}  # an older version may not have had the others
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"output: {file} cannot be read ({reason}); use a new folder"
            ) from error


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _move(partial: Path, folder: Path) -> None:
    """Give a written checkpoint its name; one that was there could not be read."""
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """ValueError (one line) where a file of the run cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"output: cannot write {file} ({error.strerror}); checkpoints are whole: free some "
            "space and run the same command again"
        ) from error


def _write_aside(file: Path, text: str) -> None:
    """Write to another name, then rename."""
    partial = file.with_suffix(".partial")
    with _writing(file):
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    _write_aside(file, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, object]:
    """What the run runs on."""
    found: dict[str, object] = {"python": platform.python_version()}
    found["platform"] = platform.platform()
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"threads": torch.get_num_threads(), "cuda": torch.version.cuda}


class Metrics:
    """The record of a run: one JSON line per measurement, and the same numbers for TensorBoard; a
    context manager that closes its files.

    A resumed run drops the lines after its checkpoint first, so that every step is recorded once.
    """

    def __init__(self, file: Path, tensorboard: Path | None, step: int) -> None:
        """Continue `file` after `step`, dropping later lines. `tensorboard` None: no such log."""
        kept = [line for line in read_metrics(file) if line["step"] <= step]
        _write_aside(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._file, self._stream = file, file.open("ab", buffering=0)
        self._writer = None if tensorboard is None else _open_tensorboard(tensorboard, step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record `values` of optimiser step `step` (1 = after the first)."""
        content = json.dumps({"step": step} | values).encode() + b"\n"
        with _writing(self._file):
            while content:  # a full disk takes a part first and refuses then
                content = content[self._stream.write(content) :]
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """All lines, but one that a kill cut short; ValueError (one line) for other damage."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            if line.endswith("\n"):
                record = json.loads(line)
                found.append(record | {"step": int(record["step"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}: line {number} is damaged; delete the line or use a new output folder"
            ) from error
    return found


def _open_tensorboard(folder: Path, step: int) -> "SummaryWriter | None":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning("no TensorBoard log: the library is missing; for one, pip install '.[train]'")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
