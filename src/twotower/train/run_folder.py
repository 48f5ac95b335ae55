"""What a run leaves on disk: options.json, versions.json, checkpoints/, export/.

Decides how a training state is written (aside, synced, then renamed: a kill at any instant leaves
loadable checkpoints) and which checkpoint a resumed run takes: a file of one process or a folder of
several (`sharded_checkpoint`). Weights for use elsewhere are exported through
`twotower.checkpoint`; the files here hold optimiser state too and are ours alone.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from twotower.config import TwoTowerConfig
from twotower.families import config_from_dict
from twotower.train.options import TrainOptions

_log = logging.getLogger(__name__)
FORMAT = 1
POSITION_FILE = "run.json"  # of a checkpoint that several processes write
_CHECKPOINT = re.compile(r"step-(\d{8,})(\.pt)?")
_LIBRARIES = ("twotower", "torch", "numpy", "tokenizers", "safetensors", "tensorboard")
# Another value of these would make another run of it, not a continued one.
_FIXED_ON_RESUME = (
    "recipe",
    "seed",
    "sequence_length",
    "init",
    "preset",
    "config",
    "block_size",
    "optimizer",
    "ema",
    "early_block_size",
    "early_share",
    "towers",
    "train_context",
    "bidirectional_mamba",
    "denoiser_init",
)


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has come, and of what."""

    step: int  # optimiser steps done
    rows_read: int  # position in the training order
    rows_fingerprint: str  # of that order
    config: dict[str, object]
    pending_losses: list[float]  # steps since the last metrics line


@dataclass(frozen=True, kw_only=True)
class Snapshot(Position):
    """All that the next step depends on, besides options and data."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, object]
    average: Mapping[str, Tensor] = field(default_factory=dict)  # of the trained weights, with ema


@dataclass(frozen=True, kw_only=True)
class ShardedSnapshot(Position):
    """A position whose tensors lie in a folder, written by several processes."""

    folder: Path


class RunFolder:
    """Paths, options and checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"

    def open(self, options: TrainOptions) -> Snapshot | ShardedSnapshot | None:
        """Create the folder, or find the snapshot to continue from; records options and versions.

        ValueError if the folder belongs to another run, or to any run without `resume`.
        """
        existing = self._steps()
        if existing and not options.resume:
            raise ValueError(
                f"out: {self.path} holds a run at step {existing[-1]}; use a new folder, or leave "
                "out --no-resume"
            )
        snapshot = self._load_newest(existing) if existing else None
        if snapshot is not None:
            self._check_same_run(options)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "options.json", options.to_dict())
        write_json(self.path / "versions.json", versions())
        return snapshot

    def save(self, snapshot: Snapshot, keep: int) -> Path:
        """Write a checkpoint, then delete all but the newest `keep`."""
        file = self._file(snapshot.step)
        content = {"format": FORMAT} | vars(snapshot)
        try:
            _write_aside(file, content)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise ValueError(
                f"checkpoint: cannot write {file} ({_one_line(error)}); earlier checkpoints are "
                "whole: "
                "free some space and run the same command again"
            ) from error
        self.drop_all_but(keep)
        return file

    def drop_all_but(self, keep: int) -> None:
        """Delete all checkpoints but the newest `keep`, and what a kill left of others."""
        for step in self._steps()[:-keep]:
            old = self._found(step)
            if old.is_dir():
                old = old.rename(self.partial(step))  # half of a folder must not look like a whole
            else:
                old.unlink()
        for partial in self.checkpoints.glob("step-*.partial"):
            if partial.is_dir():
                shutil.rmtree(partial)

    def newest(self) -> Path | None:
        """The newest checkpoint, if any: a file, or a folder of several processes."""
        steps = self._steps()
        return self._found(steps[-1]) if steps else None

    def sharded(self, step: int) -> Path:
        """The folder of a checkpoint that several processes write."""
        return self.checkpoints / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Where it is written before it gets its name."""
        return self.sharded(step).with_suffix(".partial")

    def _file(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.pt"

    def _found(self, step: int) -> Path:
        return self.sharded(step) if self.sharded(step).is_dir() else self._file(step)

    def _steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = [path.name for path in self.checkpoints.glob("step-*")]
        found = (_CHECKPOINT.fullmatch(name) for name in names)
        return sorted({int(match[1]) for match in found if match})

    def _load_newest(self, steps: list[int]) -> Snapshot | ShardedSnapshot:
        for step in reversed(steps):
            found = self._found(step)
            try:
                return read_position(found) if found.is_dir() else read_snapshot(found)
            except ValueError as error:
                _log.warning("%s; trying the one before", error)
        raise ValueError(f"out: no checkpoint in {self.checkpoints} can be read; use a new folder")

    def _check_same_run(self, options: TrainOptions) -> None:
        file = self.path / "options.json"
        try:
            before = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"out: {file} cannot be read ({_one_line(error)}); use a new folder"
            ) from error
        now = json.loads(json.dumps(options.to_dict()))
        defaults = {field.name: field.default for field in fields(TrainOptions)}
        for name in _FIXED_ON_RESUME:
            then = before.get(name, defaults[name])  # an older version may not have had it
            if then != now[name]:
                raise ValueError(
                    f"{name}: {now[name]} differs from {then} of the run in "
                    f"{self.path}; "
                    "use that value, or another --out"
                )


def read_snapshot(file: Path) -> Snapshot:
    """Read one checkpoint; ValueError (one line) if it is damaged or of another format."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if content.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        return Snapshot(**content)
    except Exception as error:  # zip, pickle and torch each raise their own kinds here
        raise ValueError(f"checkpoint: {file} cannot be read ({_one_line(error)})") from error


def read_position(folder: Path) -> ShardedSnapshot:
    """What a checkpoint of several processes says of itself; ValueError (one line) if a file of it
    is missing or cut short. Its tensors are read by `sharded_checkpoint`.
    """
    try:
        content = json.loads((folder / POSITION_FILE).read_text())
        if content.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        for name, size in content.pop("files").items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} is damaged")
        return ShardedSnapshot(folder=folder, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"checkpoint: {folder} cannot be read ({_one_line(error)})") from error


def model_config(snapshot: Position) -> TwoTowerConfig:
    return config_from_dict(snapshot.config)


def _write_aside(file: Path, content: dict[str, object]) -> None:
    partial = file.with_suffix(".partial")
    try:
        with partial.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Write aside, then rename."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(file)


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
