"""Denoiser runs of a few steps, and what they leave behind."""

from pathlib import Path

from tiny_training import tiny_options
from twotower.checkpoint import load_checkpoint
from twotower.model.two_tower import TwoTower
from twotower.train.loop import StepReport, train_steps
from twotower.train.options import TrainOptions
from twotower.train.run_folder import RunFolder


def run(options: TrainOptions) -> list[StepReport]:
    return list(train_steps(options))


def make_backbone(data: Path, out: Path, **changes: object) -> Path:
    """The export of a backbone that has seen a few batches of the shard `data`."""
    options = tiny_options(data, out, **{"steps": 3} | changes)
    run(options)
    return RunFolder(options.run_folder).export


def denoiser(data: Path, init: Path, out: Path, **changes: object) -> TrainOptions:
    """Options of a denoiser run that starts from the checkpoint `init`."""
    values: dict[str, object] = {"recipe": "denoiser", "init": str(init), "preset": None}
    return tiny_options(data, out, **values | {"steps": 4} | changes)


def exported(options: TrainOptions) -> TwoTower:
    return load_checkpoint(RunFolder(options.run_folder).export)
