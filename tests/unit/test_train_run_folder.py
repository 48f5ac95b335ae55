"""Checkpoints and metrics of a run folder: what survives a kill, what is refused."""

import json
from pathlib import Path

import pytest
import torch

from tiny_training import tiny_options
from twotower.train import run_folder
from twotower.train.metrics import Metrics, read_metrics
from twotower.train.run_folder import RunFolder, Snapshot


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step=step,
        rows_read=4 * step,
        rows_fingerprint="abc",
        config={"hidden_size": 1},
        model={"weight": torch.full((3,), float(step))},
        optimizer={"state": {}, "param_groups": []},
        pending_losses=[0.5],
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    assert folder.open(tiny_options(tmp_path, folder.path)) is None
    return folder


def reopen(folder: RunFolder, **changes: object) -> Snapshot | None:
    return RunFolder(folder.path).open(tiny_options(folder.path.parent, folder.path, **changes))


def test_the_newest_snapshot_comes_back_whole(folder: RunFolder) -> None:
    for step in (3, 6, 9):
        folder.save(snapshot(step), keep=2)
    found = reopen(folder)
    assert found is not None
    assert found.step == 9
    assert found.model["weight"].tolist() == [9.0] * 3
    assert vars(found).keys() == vars(snapshot(9)).keys()
    assert found.pending_losses == [0.5]
    names = [path.name for path in sorted(folder.checkpoints.iterdir())]
    assert names == ["step-00000006.pt", "step-00000009.pt"]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.save(snapshot(3), keep=2)
    newest = folder.save(snapshot(6), keep=2)
    newest.write_bytes(newest.read_bytes()[:200])
    found = reopen(folder)
    assert found is not None and found.step == 3
    assert "step-00000006.pt cannot be read" in caplog.text
    folder.save(snapshot(3), keep=1)
    (folder.checkpoints / "step-00000003.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in"):
        reopen(folder)


def test_a_kill_while_writing_leaves_the_old_checkpoint(folder: RunFolder) -> None:
    """Silent failure: half a file under the final name is taken for the newest checkpoint."""
    folder.save(snapshot(3), keep=2)
    (folder.checkpoints / "step-00000006.partial").write_bytes(b"half")
    found = reopen(folder)
    assert found is not None and found.step == 3


def test_a_full_disk_keeps_the_old_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save(snapshot(3), keep=1)

    def fail(content: object, stream: object) -> None:
        stream.write(b"some")  # type: ignore[attr-defined]  # a file, in torch.save
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.torch, "save", fail)
    with pytest.raises(ValueError, match="No space left"):
        folder.save(snapshot(6), keep=1)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000003.pt"]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"sequence_length": 16}, {"preset": "small"}])
def test_another_run_is_not_continued(folder: RunFolder, changes: dict[str, object]) -> None:
    """Silent failure: a run goes on with another seed or model than it began with."""
    folder.save(snapshot(3), keep=1)
    with pytest.raises(ValueError, match=next(iter(changes))):
        reopen(folder, **changes)
    assert json.loads((folder.path / "options.json").read_text())["preset"] == "tiny"
    longer = reopen(folder, steps=99, learning_rate=0.5)
    assert longer is not None


def test_no_resume_never_touches_an_old_run(folder: RunFolder) -> None:
    folder.save(snapshot(3), keep=1)
    with pytest.raises(ValueError, match="holds a run at step 3"):
        reopen(folder, resume=False)


def test_options_and_versions_are_recorded(folder: RunFolder) -> None:
    options = json.loads((folder.path / "options.json").read_text())
    assert options["steps"] == 8 and options["betas"] == [0.9, 0.95]
    versions = json.loads((folder.path / "versions.json").read_text())
    assert versions["torch"] == torch.__version__.split("+")[0] or "+" in versions["torch"]


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    """Silent failure: steps that were repeated after a kill appear twice."""
    file = tmp_path / "metrics.jsonl"
    with Metrics(file, None, 0) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"loss": step / 10})
    with file.open("a") as stream:
        stream.write('{"step": 6, "lo')  # cut by a kill
    with Metrics(file, None, 3) as metrics:
        metrics.write(4, {"loss": 7.0})
    assert read_metrics(file) == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": 0.3},
        {"step": 4, "loss": 7.0},
    ]


def test_tensorboard_log_is_written_when_there_is_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Metrics(tmp_path / "m.jsonl", tmp_path / "tb", 0) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert [path for path in (tmp_path / "tb").iterdir() if path.stat().st_size > 0]


def test_missing_tensorboard_is_one_line_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with Metrics(tmp_path / "m.jsonl", tmp_path / "tb", 0) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert len(caplog.records) == 1 and "pip install" in caplog.text
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 1.0}]
