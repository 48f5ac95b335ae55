"""What a run leaves on disk: options.json, versions.json, checkpoints/, export/.

Decides how a training state is written (aside, synced, then renamed: a kill at any instant leaves
loadable checkpoints) and which checkpoint a resumed run takes. Weights for use elsewhere are
exported through `twotower.checkpoint`; the files here hold optimiser state too and are ours alone.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.train.options import TrainOptions

_log = logging.getLogger(__name__)
FORMAT = 1
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
class Snapshot:
    """All that the next step depends on, besides options and data."""

    step: int  # optimiser steps done
    rows_read: int  # position in the training order
    rows_fingerprint: str  # of that order
    config: dict[str, object]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, object]
    pending_losses: list[float]  # steps since the last metrics line
    average: Mapping[str, Tensor] = field(default_factory=dict)  # of the trained weights, with ema


class RunFolder:
    """Paths, options and checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"

    def open(self, options: TrainOptions) -> Snapshot | None:
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
        for step in self._steps()[:-keep]:
            self._file(step).unlink()
        return file

    def newest(self) -> Path | None:
        """The newest checkpoint file, if any."""
        steps = self._steps()
        return self._file(steps[-1]) if steps else None

    def _file(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.pt"

    def _steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(
            int(file.stem.removeprefix("step-")) for file in self.checkpoints.glob("step-*.pt")
        )

    def _load_newest(self, steps: list[int]) -> Snapshot:
        for step in reversed(steps):
            try:
                return read_snapshot(self._file(step))
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


def model_config(snapshot: Snapshot) -> ModelConfig:
    return ModelConfig.from_dict(snapshot.config)


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
