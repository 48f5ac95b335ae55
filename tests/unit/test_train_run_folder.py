"""Checkpoints and metrics of a run folder: what survives a kill, what is refused."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny_state import make_state
from tiny_training import saved_tensors, tiny_options
from twotower.train import run_folder
from twotower.train.processes import ALONE
from twotower.train.run_folder import Metrics, RunFolder, read_metrics
from twotower.train.state import (
    STATE_FILE,
    Checkpoint,
    load_state,
    write_part,
)


def save(folder: RunFolder, step: int, keep: int = 2) -> Path:
    folder.save(make_state(step=step), "abc", keep, ALONE)
    return folder.checkpoint(step)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    assert folder.open(tiny_options(tmp_path, folder.path, steps=20)) is None
    return folder


def reopen(folder: RunFolder, **changes: object) -> Checkpoint | None:
    values = {"steps": 20} | changes
    return RunFolder(folder.path).open(tiny_options(folder.path.parent, folder.path, **values))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoint_comes_back_whole(folder: RunFolder) -> None:
    """Silent failure: a moment, a momentum, an average or a buffer begins anew."""
    for step in (3, 6, 9):
        save(folder, step)
    found = reopen(folder)
    assert found is not None and (found.step, found.rows_read) == (9, 36)
    before, after = make_state(step=9), make_state(seed=1)
    load_state(found, after)
    assert (after.step, after.rows_read, after.pending_losses) == (9, 36, [0.1, 3.0])
    assert before.tensors().keys() == after.tensors().keys()
    kinds = {name.split(".")[0] for name in after.tensors()}
    keys = {n.rsplit(".", 1)[1] for n in after.tensors() if n.startswith("optimizer.")}
    assert kinds == {"model", "optimizer", "average"}
    assert keys == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    saved = saved_tensors(found.folder, "")
    assert all(torch.equal(value, saved[name]) for name, value in after.tensors().items())
    assert names_in(folder.checkpoints) == ["step-00000006", "step-00000009"]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 3)
    (tensors,) = save(folder, 6).glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    found = reopen(folder)
    assert found is not None and found.step == 3
    assert "step-00000006 cannot be read (tensors-00000-of-00001.safetensors is" in caplog.text
    save(folder, 6)  # the run comes to that step again
    found = reopen(folder)
    assert found is not None and found.step == 6
    for step in (3, 6):
        (folder.checkpoint(step) / STATE_FILE).write_text("")
    with pytest.raises(ValueError, match="no checkpoint in"):
        reopen(folder)


def test_a_kill_while_writing_leaves_the_old_checkpoint(folder: RunFolder) -> None:
    """Silent failure: half a folder under the final name is taken for the newest checkpoint."""
    save(folder, 3)
    half = folder.partial(6)
    half.mkdir()
    write_part(half, make_state(step=6), 0, 1)
    found = reopen(folder)
    assert found is not None and found.step == 3
    save(folder, 9, keep=1)
    assert names_in(folder.checkpoints) == ["step-00000009"]


def test_a_full_disk_keeps_the_old_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 3, keep=1)

    def fail(path: Path, *_: object) -> None:
        (path / "tensors-00000-of-00001.safetensors").write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_part", fail)
    with pytest.raises(ValueError, match="No space left") as caught:
        save(folder, 6, keep=1)
    assert "\n" not in str(caught.value)
    assert names_in(folder.checkpoints) == ["step-00000003"]


def test_a_full_disk_is_named(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the records of a run: "No space left on device" told of no file and no remedy."""
    said = r"output: cannot write .*(options|metrics)\.jsonl? \(No space .*free some space"
    if not Path("/dev/full").exists():
        pytest.skip("needs a disk that is full")
    metrics = Metrics(folder.metrics, None, 0)
    with Path("/dev/full").open("ab", buffering=0) as full, metrics:
        monkeypatch.setattr(metrics, "_stream", full)
        with pytest.raises(ValueError, match=said):
            metrics.write(1, {"loss": 1.0})

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ValueError, match=said):
        reopen(folder)


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_bomb_goes_off(tmp_path: Path) -> None:
    """Guards the tests below: their file would create the marker if anything unpickled it."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def bomb_as_torchs_checkpoint(folder: RunFolder, bomb: bytes) -> None:
    path = folder.checkpoint(6)
    path.mkdir()
    for name in (".metadata", "__0_0.distcp", "model.pt", "state.json"):
        (path / name).write_bytes(bomb)


def bomb_as_tensors(folder: RunFolder, bomb: bytes) -> None:
    save(folder, 6)
    path = folder.checkpoint(6)
    (tensors,) = path.glob("*.safetensors")
    tensors.write_bytes(bomb)
    content = json.loads((path / STATE_FILE).read_text())
    content["files"] = {tensors.name: len(bomb)}
    (path / STATE_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize("place", [bomb_as_torchs_checkpoint, bomb_as_tensors])
def test_a_foreign_run_folder_runs_no_code(
    folder: RunFolder, tmp_path: Path, place: Callable[[RunFolder, bytes], None]
) -> None:
    """Silent failure: resuming from a folder that somebody else made is running their program."""
    marker = tmp_path / "marker"
    place(folder, pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match=r"not read|can be read|cannot be read") as caught:
        found = reopen(folder)
        assert found is not None
        load_state(found, make_state())
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("changes", [{"seed": 1}, {"sequence_length": 16}, {"preset": "small"}])
def test_another_run_is_not_continued(
    folder: RunFolder, changes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """Silent failure: a run goes on with another seed or model than it began with."""
    save(folder, 3)
    with pytest.raises(ValueError, match=next(iter(changes))):
        reopen(folder, **changes)
    assert json.loads((folder.path / "options.json").read_text())["preset"] == "tiny"
    longer = reopen(folder, steps=99, learning_rate=0.5)
    assert longer is not None
    assert "learning_rate: 0.5 from step 3 on, 0.003 before" in caplog.text
    assert "steps" not in caplog.text


@pytest.mark.parametrize("text", ["[]", "{}", "[" * 100_000, "?"])
def test_a_damaged_record_of_options_is_one_line(folder: RunFolder, text: str) -> None:
    save(folder, 3)
    (folder.path / "options.json").write_text(text)
    with pytest.raises(ValueError, match=r"options.json cannot be read") as caught:
        reopen(folder)
    assert "\n" not in str(caught.value)


def test_no_resume_never_touches_an_old_run(folder: RunFolder) -> None:
    save(folder, 3)
    with pytest.raises(ValueError, match="holds a run at step 3"):
        reopen(folder, resume=False)


def test_options_and_versions_are_recorded(folder: RunFolder) -> None:
    options = json.loads((folder.path / "options.json").read_text())
    assert options["steps"] == 20 and options["betas"] == [0.9, 0.95]
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


@pytest.mark.parametrize(
    "line", ["?", "[1]", '{"loss": 1}', '{"step": "x"}', b"\xff".decode("latin")]
)
def test_a_damaged_record_is_one_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is damaged") as caught:
        Metrics(file, None, 3)
    assert "\n" not in str(caught.value)


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
