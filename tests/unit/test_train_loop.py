"""The training loop in one process: learning, resuming, stopping, refusing."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_denoiser import denoiser
from tiny_training import make_shard, saved_tensors, tiny_options
from twotower.checkpoint import save_backbone
from twotower.families import config_to_dict
from twotower.model.initialise import randomise
from twotower.model.two_tower import TwoTower
from twotower.train import loop
from twotower.train.loop import StepReport, train_steps
from twotower.train.options import TrainOptions
from twotower.train.presets import preset_config
from twotower.train.run_folder import RunFolder, read_metrics
from twotower.train.shard import Shard
from twotower.train.start import begin
from twotower.train.state import TrainState, read_checkpoint


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


def save_tiny_backbone(data: Path, folder: Path) -> None:
    model = TwoTower(preset_config("tiny", Shard(data).meta.vocab_size), "context")
    randomise(model, seed=0)
    save_backbone(model, folder)


def run(options: TrainOptions) -> list[StepReport]:
    return list(train_steps(options))


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
    steps = train_steps(broken)
    for _ in range(8):
        next(steps)
    del steps  # as a kill would: nothing is saved on the way out
    first = run(broken)[0].step
    assert first == 7  # after the checkpoint of step 6
    assert losses(broken) == losses(whole)
    one, two = (saved_tensors(RunFolder(o.run_folder).newest(), "") for o in (whole, broken))
    assert one.keys() == two.keys() and len(one) > 3 * 15
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_trainers_of_one_folder_are_refused(data: Path, tmp_path: Path) -> None:
    """Silent failure: two processes write one record and delete each other's checkpoints."""
    options = tiny_options(data, tmp_path / "run", steps=4)
    steps = train_steps(options)
    next(steps)
    before = (options.run_folder / "options.json").read_bytes()
    with pytest.raises(ValueError, match="is being written by another process; wait for its end"):
        run(tiny_options(data, tmp_path / "run", steps=9))
    assert (options.run_folder / "options.json").read_bytes() == before
    assert next(steps).step == 2  # who was first goes on
    steps.close()
    assert run(options)[-1].step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


SPLITS = [(1, 8), (2, 4), (4, 2), (8, 1)]
OBJECTIVES: list[dict[str, object]] = [
    {},
    {"targets": "completion", "denoised_blocks_per_row": 2, "mask_rate_per": "block"},
    {"targets": "completion", "loss_weight": "elbo"},
    {"train_context": True, "ar_loss_weight": 0.3},
]


@pytest.mark.parametrize("values", [{"recipe": "backbone"}, *OBJECTIVES], ids=str)
def test_the_split_into_passes_changes_no_gradient(
    data: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    """Silent failure: each pass is divided by its own tokens, so that `--accumulate 32` gives a
    loss of 0.50 where one pass gives 6.14; or passes draw other noise than one large batch.
    """
    save_tiny_backbone(data, tmp_path / "backbone")
    found = []
    for batch_size, accumulate in SPLITS:
        changes = {"batch_size": batch_size, "accumulate": accumulate, "steps": 2, **values}
        out = tmp_path / f"{batch_size} x {accumulate}"
        if values.get("recipe") == "backbone":
            reports = run(tiny_options(data, out, **changes))
        else:
            reports = run(denoiser(data, tmp_path / "backbone", out, **changes))
        state = saved_tensors(RunFolder(out).newest(), "optimizer.")
        # Adam's first moment after two steps is a sum of their gradients, which it does not scale.
        moments = {n: v for n, v in state.items() if n.endswith("exp_avg")}
        found.append((reports, moments))
    first, expected = found[0]
    for reports, moments in found[1:]:
        for one, other in zip(first, reports, strict=True):
            assert other.loss == pytest.approx(one.loss, rel=1e-5)
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert moments.keys() == expected.keys()
        for name, moment in moments.items():
            torch.testing.assert_close(moment, expected[name], rtol=1e-3, atol=1e-6)


def test_another_split_continues_a_run_with_the_same_noise(data: Path, tmp_path: Path) -> None:
    """Silent failure: a batch of 4 x 2 passes that continues a run of 8 draws other noise."""
    save_tiny_backbone(data, tmp_path / "backbone")
    losses = []
    for name, second in (("whole", {"batch_size": 8}), ("other", {"accumulate": 2})):
        changes: dict[str, object] = {"batch_size": 8, "decay_fraction": 0.0}
        out = tmp_path / name
        run(denoiser(data, tmp_path / "backbone", out, **changes, steps=2))
        longer = changes | {"batch_size": 4} | second
        reports = run(denoiser(data, tmp_path / "backbone", out, **longer, steps=4))
        losses.append([report.loss for report in reports])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_validation_does_not_depend_on_the_batch(data: Path, tmp_path: Path) -> None:
    """Silent failure: a mean of means, in which a short last batch counts as much as a whole."""
    save_tiny_backbone(data, tmp_path / "backbone")
    measured = []
    for batch_size in (1, 3, 8):
        options = denoiser(
            data, tmp_path / "backbone", tmp_path / f"{batch_size}", batch_size=batch_size,
            steps=1, eval_every=1, eval_rows=5, learning_rate=1e-12, targets="completion",
        )  # fmt: skip
        measured.append(run(options)[-1].validation_loss)
    assert measured == pytest.approx([measured[0]] * 3, rel=1e-6)


def test_a_longer_run_continues_a_shorter_one(data: Path, tmp_path: Path) -> None:
    run(tiny_options(data, tmp_path / "run", steps=4))
    assert [report.step for report in run(tiny_options(data, tmp_path / "run", steps=6))] == [5, 6]
    assert run(tiny_options(data, tmp_path / "run", steps=6)) == []


def test_fewer_steps_than_are_done_are_refused(data: Path, tmp_path: Path) -> None:
    """Silent failure: `--steps 3` says "3 steps done" and exports the model of step 6."""
    out = tmp_path / "run"
    run(tiny_options(data, out, steps=6))
    with pytest.raises(
        ValueError, match=r"steps: 3, but the run in .* is at step 6 already; give 6 to export"
    ) as caught:
        run(tiny_options(data, out, steps=3))
    assert "\n" not in str(caught.value)
    assert json.loads((out / "options.json").read_text())["steps"] == 6
    assert run(tiny_options(data, out, steps=6)) == []


def test_weight_decay_and_betas_may_change(data: Path, tmp_path: Path) -> None:
    """Silent failure: the optimiser goes on with the values of the checkpoint."""
    moved = []
    for name, changes in {"a": {}, "b": {"weight_decay": 5.0}, "c": {"betas": [0.1, 0.2]}}.items():
        run(tiny_options(data, tmp_path / name, steps=3))
        run(tiny_options(data, tmp_path / name, steps=5, **changes))
        newest = RunFolder(tmp_path / name).newest()
        moved.append(saved_tensors(newest)["context_lm_head.weight"])
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])


def test_another_model_under_the_same_name_is_refused(data: Path, tmp_path: Path) -> None:
    """Silent failure: config.json was edited, and the run goes on with what it said before."""
    config = config_to_dict(preset_config("tiny", 270))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    options = {"preset": None, "config": str(file)}
    run(tiny_options(data, tmp_path / "run", steps=2, **options))
    file.write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ValueError, match="config: describes another model now"):
        run(tiny_options(data, tmp_path / "run", steps=3, **options))


def test_sigterm_finishes_the_step_and_saves(data: Path, tmp_path: Path) -> None:
    options = tiny_options(data, tmp_path / "run", steps=8, checkpoint_every=100)
    steps = train_steps(options)
    before = signal.getsignal(signal.SIGTERM)
    assert next(steps).step == 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert list(steps) == []
    assert signal.getsignal(signal.SIGTERM) == before
    newest = RunFolder(options.run_folder).newest()
    assert newest is not None and read_checkpoint(newest).step == 1


@pytest.mark.parametrize("recipe", ["backbone", "denoiser"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Silent failure: hours of training on NaN, and every checkpoint overwritten with it."""
    changes: dict[str, object] = {"steps": 8, "checkpoint_every": 2}
    options = tiny_options(data, tmp_path / "run", **changes)
    if recipe == "denoiser":
        save_tiny_backbone(data, tmp_path / "backbone")
        options = denoiser(data, tmp_path / "backbone", tmp_path / "run", **changes)
    models: list[TwoTower] = []

    def remember(*args: Any) -> TrainState:
        state = begin(*args)
        models.append(state.model)
        return state

    monkeypatch.setattr(loop, "begin", remember)
    steps = train_steps(options)
    for _ in range(3):
        next(steps)
    head = models[0].lm_head if recipe == "denoiser" else models[0].context_lm_head
    with torch.no_grad():
        head.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"nan.*step 4, rows 12 to 15.*step-00000002: ") as caught:
        next(steps)
    assert "\n" not in str(caught.value)
    newest = RunFolder(options.run_folder).newest()
    assert newest is not None and newest.name == "step-00000002"
    assert all(value.isfinite().all() for value in saved_tensors(newest, "").values())


def test_nan_before_any_checkpoint_says_so(data: Path, tmp_path: Path) -> None:
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0.0, "checkpoint_every": 100}
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
    assert {value.dtype for value in saved_tensors(newest, "").values()} == {torch.float32}
