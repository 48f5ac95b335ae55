"""The training loop in one process: learning, resuming, stopping, refusing."""

import os
import signal
from pathlib import Path

import pytest
import torch

from tiny_denoiser import denoiser
from tiny_training import make_shard, tiny_options
from twotower.checkpoint import save_backbone
from twotower.model.two_tower import TwoTower
from twotower.train import loop
from twotower.train.loop import StepReport, train
from twotower.train.metrics import read_metrics
from twotower.train.options import TrainOptions
from twotower.train.presets import preset_config
from twotower.train.run_folder import RunFolder, read_snapshot
from twotower.train.shard import Shard


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("data") / "shard")


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported is the e2e test's business."""
    monkeypatch.setattr(loop, "export", lambda *_: None)


def losses(options: TrainOptions) -> list[tuple[float, float]]:
    return [
        (line["step"], line["loss"])
        for line in read_metrics(RunFolder(options.run_folder).metrics)
        if "loss" in line
    ]


def run(options: TrainOptions) -> list[StepReport]:
    return list(train(options))


def test_a_short_run_learns(data: Path, tmp_path: Path) -> None:
    options = tiny_options(
        data, tmp_path / "run", steps=30, learning_rate=0.01, eval_every=15, eval_rows=4
    )
    reports = run(options)
    assert [report.step for report in reports] == list(range(1, 31))
    assert reports[0].loss == pytest.approx(torch.log(torch.tensor(270.0)).item(), abs=0.3)
    assert reports[-1].loss < 0.5 * reports[0].loss
    measured = [report.validation_loss for report in reports if report.validation_loss is not None]
    assert len(measured) == 2 and max(measured) < 0.5 * reports[0].loss
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["validation_loss"] for line in lines if "validation_loss" in line] == measured


def test_a_resumed_run_equals_an_unbroken_one(data: Path, tmp_path: Path) -> None:
    """Silent failure: optimiser state, data position or noise are lost at a restart.

    The break falls between two checkpoints and between two metric lines.
    """
    changes = {"steps": 11, "log_every": 4, "checkpoint_every": 3, "accumulate": 2, "batch_size": 2}
    whole = tiny_options(data, tmp_path / "whole", **changes)
    broken = tiny_options(data, tmp_path / "broken", **changes)
    run(whole)
    steps = train(broken)
    for _ in range(8):
        next(steps)
    del steps  # as a kill would: nothing is saved on the way out
    first = run(broken)[0].step
    assert first == 7  # after the checkpoint of step 6
    assert losses(broken) == losses(whole)
    ends = [RunFolder(o.run_folder).newest() for o in (whole, broken)]
    one, two = (read_snapshot(file) for file in ends if file is not None)
    assert one.model.keys() == two.model.keys()
    assert all(torch.equal(one.model[name], two.model[name]) for name in one.model)


def test_accumulation_equals_one_large_batch(data: Path, tmp_path: Path) -> None:
    """Silent failure: gradients of several passes are summed instead of averaged."""
    one = tiny_options(data, tmp_path / "one", steps=3, batch_size=4)
    two = tiny_options(data, tmp_path / "two", steps=3, batch_size=1, accumulate=4)
    for a, b in zip(run(one), run(two), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)


def test_a_longer_run_continues_a_shorter_one(data: Path, tmp_path: Path) -> None:
    run(tiny_options(data, tmp_path / "run", steps=4))
    assert [report.step for report in run(tiny_options(data, tmp_path / "run", steps=6))] == [5, 6]
    assert run(tiny_options(data, tmp_path / "run", steps=6)) == []


def test_sigterm_finishes_the_step_and_saves(data: Path, tmp_path: Path) -> None:
    options = tiny_options(data, tmp_path / "run", steps=8, checkpoint_every=100)
    steps = train(options)
    before = signal.getsignal(signal.SIGTERM)
    assert next(steps).step == 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert list(steps) == []
    assert signal.getsignal(signal.SIGTERM) == before
    newest = RunFolder(options.run_folder).newest()
    assert newest is not None and read_snapshot(newest).step == 1


@pytest.mark.parametrize("recipe", ["backbone", "denoiser"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Silent failure: hours of training on NaN, and every checkpoint overwritten with it."""
    changes: dict[str, object] = {"steps": 8, "checkpoint_every": 2}
    options = tiny_options(data, tmp_path / "run", **changes)
    if recipe == "denoiser":
        config = preset_config("tiny", Shard(data).meta.vocab_size)
        save_backbone(TwoTower(config, "context"), tmp_path / "backbone")
        options = denoiser(data, tmp_path / "backbone", tmp_path / "run", **changes)
    original = loop.Training.__post_init__
    models: list[TwoTower] = []

    def remember(self: loop.Training) -> None:
        original(self)
        models.append(self.model)

    monkeypatch.setattr(loop.Training, "__post_init__", remember)
    steps = train(options)
    for _ in range(3):
        next(steps)
    head = models[0].lm_head if recipe == "denoiser" else models[0].context_lm_head
    with torch.no_grad():
        head.weight[5] = float("nan")
    with pytest.raises(
        ValueError, match=r"nan.*step 4, rows 12 to 15.*step-00000002\.pt"
    ) as caught:
        next(steps)
    assert "\n" not in str(caught.value)
    newest = RunFolder(options.run_folder).newest()
    assert newest is not None
    good = read_snapshot(newest)
    assert good.step == 2 and all(value.isfinite().all() for value in good.model.values())


def test_nan_before_any_checkpoint_says_so(data: Path, tmp_path: Path) -> None:
    wild = {"learning_rate": 1e30, "warmup": 0, "grad_clip": 0.0, "checkpoint_every": 100}
    options = tiny_options(data, tmp_path / "run", steps=8, **wild)
    with pytest.raises(ValueError, match=r"stopped, there is no checkpoint yet: lower") as caught:
        run(options)
    assert "none" not in str(caught.value)


def test_other_data_is_not_continued(data: Path, tmp_path: Path) -> None:
    run(tiny_options(data, tmp_path / "run", steps=2))
    other = make_shard(tmp_path / "other", count=300)
    with pytest.raises(ValueError, match="not what the run was trained on"):
        run(tiny_options(other, tmp_path / "run", steps=4))


def test_bfloat16_autocast_trains_float32_weights(data: Path, tmp_path: Path) -> None:
    options = tiny_options(data, tmp_path / "run", steps=3, dtype="bfloat16")
    exact = run(tiny_options(data, tmp_path / "exact", steps=3))
    rounded = run(options)
    assert rounded[-1].loss == pytest.approx(exact[-1].loss, abs=0.05)
    assert rounded[-1].loss != exact[-1].loss
    newest = RunFolder(options.run_folder).newest()
    assert newest is not None
    assert {value.dtype for value in read_snapshot(newest).model.values()} == {torch.float32}
