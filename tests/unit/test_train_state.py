"""What a checkpoint holds: read by any number of processes, refused when it is not ours."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiny_state import make_state
from tiny_training import saved_tensors
from twotower.train.state import (
    STATE_FILE,
    _Stored,
    load_state,
    read_checkpoint,
    write_description,
    write_part,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one process."""
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    write_part(folder, make_state(step=3), 0, 1)
    write_description(folder, make_state(step=3), "abc")
    return folder


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
def test_what_several_processes_wrote_is_one_state(saved: Path, tmp_path: Path, count: int) -> None:
    """Silent failure: rows of another process in the wrong place, or left out."""
    several = in_rows(saved, tmp_path / "several", count)
    after = make_state(seed=1)
    load_state(read_checkpoint(several), after)
    expected = saved_tensors(saved, "")
    assert all(torch.equal(value, expected[name]) for name, value in after.tensors().items())


def test_a_process_reads_its_rows_across_files(tmp_path: Path) -> None:
    """Silent failure: a process of another number of them gets rows of its neighbour."""
    whole = torch.arange(14.0).view(7, 2)
    files = []
    for at, (start, stop) in enumerate([(0, 3), (3, 6), (6, 7)]):
        save_file({"a": whole[start:stop].contiguous()}, tmp_path / f"{at}.safetensors")
        files.append(safe_open(tmp_path / f"{at}.safetensors", framework="pt"))
    stored = _Stored(files)
    assert stored.shape("a") == (7, 2)
    for start in range(8):
        for count in range(8 - start):
            assert torch.equal(stored.rows("a", start, count), whole[start : start + count])


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
    "a file elsewhere": lambda f: (
        (f.parent / "x.safetensors").write_bytes(b"ab"),
        edit(f, files={"../x.safetensors": 2}),
    ),
    "another model": lambda f: edit(f, config={"hidden_size": 1}),
    "no model": lambda f: edit(f, config=None),
}


@pytest.mark.parametrize("kind", BAD_DESCRIPTIONS)
def test_what_we_did_not_write_is_refused(saved: Path, kind: str) -> None:
    BAD_DESCRIPTIONS[kind](saved)
    with pytest.raises(ValueError, match=r"checkpoint: .* cannot be read") as caught:
        read_checkpoint(saved)
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
    saved: Path, harm: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    """Silent failure: a weight keeps its initial value, or is cast or broadcast from another."""
    (file,) = saved.glob("*.safetensors")
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file)
    edit(saved, files={file.name: file.stat().st_size})
    with pytest.raises(ValueError, match=r"cannot be read .*; delete it to go on") as caught:
        load_state(read_checkpoint(saved), make_state())
    assert "\n" not in str(caught.value)


def test_another_optimizer_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown|has momentum_buffer"):
        load_state(read_checkpoint(saved), make_state(optimizer="adamw"))


def test_a_description_is_written_last(tmp_path: Path) -> None:
    """Silent failure: a folder without all of its tensors describes itself as whole."""
    write_part(tmp_path, make_state(step=3), 0, 1)
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path)
    write_description(tmp_path, make_state(step=3), "abc")
    assert read_checkpoint(tmp_path).step == 3
