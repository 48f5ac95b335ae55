"""Checkpoints and metrics of a run folder: what survives a kill, what is refused."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_training import saved_tensors, tiny_options
from twotower.model.initialise import randomise
from twotower.model.two_tower import TwoTower
from twotower.train import run_folder
from twotower.train.optimizer import WeightAverage, make_optimizer
from twotower.train.options import TrainOptions
from twotower.train.presets import preset_config
from twotower.train.processes import ALONE
from twotower.train.run_folder import Metrics, RunFolder, read_metrics
from twotower.train.state import (
    STATE_FILE,
    Checkpoint,
    TrainState,
    load_state,
    read_checkpoint,
    write_description,
    write_part,
)


def make_state(seed: int = 0, step: int = 0, optimizer: str = "muon") -> TrainState:
    """A tiny state that has been moved once by each of its parts."""
    model = TwoTower(preset_config("tiny", 64), "context")
    randomise(model, seed)
    options = TrainOptions(recipe="backbone", optimizer=optimizer)  # type: ignore[arg-type]
    average = WeightAverage(model, 0.5)
    state = TrainState(model=model, optimizer=make_optimizer(model, options), average=average)
    if step:
        model.context_logits(torch.randint(0, 64, (2, 8))).square().mean().backward()
        state.optimizer.set_learning_rate(0.01)
        state.optimizer.step()
        average.update(step)
        state.step, state.rows_read, state.pending_losses = step, 4 * step, [0.1, step / 3]
    return state


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


def in_rows(folder: Path, target: Path, count: int) -> Path:
    """The checkpoint as `count` processes would have written it: each its chunk of the rows."""
    state = json.loads((folder / STATE_FILE).read_text())
    (file,) = folder.glob("*.safetensors")
    whole = load_file(file)
    target.mkdir()
    for rank in range(count):
        pieces = {}
        for name, value in whole.items():
            if name.endswith(".step") or not value.dim():
                pieces |= {name: value} if rank == 0 else {}
                continue
            chunk = -(-len(value) // count)
            own = value[rank * chunk : (rank + 1) * chunk]
            pieces |= {name: own.contiguous()} if len(own) else {}
        save_file(pieces, target / f"tensors-{rank:05d}-of-{count:05d}.safetensors")
    state["files"] = {f.name: f.stat().st_size for f in target.glob("*.safetensors")}
    (target / STATE_FILE).write_text(json.dumps(state))
    return target


@pytest.mark.parametrize("count", [2, 3, 7])
def test_what_several_processes_wrote_is_one_state(folder: RunFolder, count: int) -> None:
    """Silent failure: rows of another process in the wrong place, or left out."""
    save(folder, 3)
    several = in_rows(folder.checkpoint(3), folder.checkpoint(4), count)
    after = make_state(seed=1)
    load_state(read_checkpoint(several), after)
    saved = saved_tensors(folder.checkpoint(3), "")
    assert all(torch.equal(value, saved[name]) for name, value in after.tensors().items())


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


def bomb_as_file_of_one_process(folder: RunFolder, bomb: bytes) -> None:
    (folder.checkpoints / "step-00000006.pt").write_bytes(bomb)


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


@pytest.mark.parametrize(
    "place", [bomb_as_file_of_one_process, bomb_as_torchs_checkpoint, bomb_as_tensors]
)
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


def edit(folder: Path, **changes: object) -> None:
    file = folder / STATE_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BAD_DESCRIPTIONS: dict[str, Callable[[Path], object]] = {
    "a list": lambda f: (f / STATE_FILE).write_text("[]"),
    "deep": lambda f: (f / STATE_FILE).write_text("[" * 100_000),
    "large": lambda f: (f / STATE_FILE).write_text(" " * (1 << 25)),
    "nothing": lambda f: (f / STATE_FILE).write_text("{}"),
    "another format": lambda f: edit(f, format=1),
    "an unknown field": lambda f: edit(f, colour="red"),
    "a step in words": lambda f: edit(f, step="3"),
    "no step": lambda f: edit(f, step=0),
    "negative rows": lambda f: edit(f, rows_read=-4),
    "losses in words": lambda f: edit(f, pending_losses=["a"]),
    "no rows": lambda f: edit(f, rows_fingerprint=None),
    "no files": lambda f: edit(f, files={}),
    "files as a list": lambda f: edit(f, files=["a"]),
    "a file elsewhere": lambda f: edit(f, files={"../../options.json": 1}),
    "another model": lambda f: edit(f, config={"hidden_size": 1}),
    "no model": lambda f: edit(f, config=None),
}


@pytest.mark.parametrize("kind", BAD_DESCRIPTIONS)
def test_what_we_did_not_write_is_refused(folder: RunFolder, kind: str) -> None:
    path = save(folder, 3)
    BAD_DESCRIPTIONS[kind](path)
    with pytest.raises(ValueError, match=r"checkpoint: .* cannot be read") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def first(tensors: dict[str, torch.Tensor], prefix: str) -> str:
    return next(name for name in tensors if name.startswith(prefix) and tensors[name].dim() == 2)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.colour"] = tensors.pop(first(tensors, "model."))


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n, v in tensors.items() if v.dim() == 2 and v.shape[0] != v.shape[1])
    tensors[name] = tensors[name].T.contiguous()


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = first(tensors, "model.")
    tensors[name] = tensors[name].half()


def forget_moment(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("exp_avg_sq"))]


def forget_average(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[first(tensors, "average.")]


@pytest.mark.parametrize("harm", [rename, transpose, narrow, forget_moment, forget_average])
def test_tensors_that_do_not_fit_are_refused(
    folder: RunFolder, harm: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    """Silent failure: a weight keeps its initial value, or is cast or broadcast from another."""
    path = save(folder, 3)
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file)
    edit(path, files={file.name: file.stat().st_size})
    with pytest.raises(ValueError, match=r"cannot be read .*; delete it to go on") as caught:
        load_state(read_checkpoint(path), make_state())
    assert "\n" not in str(caught.value)


def test_another_optimizer_is_refused(folder: RunFolder) -> None:
    path = save(folder, 3)
    with pytest.raises(ValueError, match=r"unknown|has momentum_buffer"):
        load_state(read_checkpoint(path), make_state(optimizer="adamw"))


def test_a_description_is_written_last(tmp_path: Path) -> None:
    """Silent failure: a folder without all of its tensors describes itself as whole."""
    write_part(tmp_path, make_state(step=3), 0, 1)
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path)
    write_description(tmp_path, make_state(step=3), "abc")
    assert read_checkpoint(tmp_path).step == 3


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
