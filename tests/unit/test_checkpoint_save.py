"""Saving: what is written is what was loaded, and a failed save leaves the old checkpoint whole."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from twotower.checkpoint import load_checkpoint, save_backbone, save_two_towers
from twotower.checkpoint.write import Piece, write_checkpoint
from twotower.families import config_from_dict, config_to_dict, read_config
from twotower.model.two_tower import TwoTower

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("case_01", "case_02", "case_03")


def headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype of every tensor of a folder, as the library reads them."""
    found = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                view = shard.get_slice(name)
                found[name] = (tuple(view.get_shape()), view.get_dtype())
    return found


def assert_same(a: TwoTower, b: TwoTower) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys() and x
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_checkpoint_survives_the_round_trip(tmp_path: Path, case: str) -> None:
    """Guards against a transposed, reordered or rounded tensor, and against names of our own."""
    model = load_checkpoint(GOLDEN / case, dtype=None)
    save_two_towers(model, tmp_path / "out")
    before, after = headers(GOLDEN / case), headers(tmp_path / "out")
    assert {n: shape for n, (shape, _) in after.items()} == {n: s for n, (s, _) in before.items()}
    for name, (_, dtype) in after.items():
        assert dtype == ("F32" if ".gate." in name else before[name][1]), name
    assert_same(load_checkpoint(tmp_path / "out", dtype=None), model)


def test_config_json_holds_the_released_fields_and_ours(tmp_path: Path) -> None:
    save_two_towers(load_checkpoint(GOLDEN / "case_03"), tmp_path / "out", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out/config.json").read_text())
    released = json.loads((GOLDEN / "case_03/config.json").read_text())
    hints = {
        "expand",
        "max_position_embeddings",
        "num_logits_to_keep",
        "partial_rotary_factor",
        "rope_theta",
        "transformers_version",
        "use_mamba_kernels",
    }
    assert {n: written.get(n) for n in released.keys() - hints} == {
        n: released[n] for n in released.keys() - hints
    }
    assert (written["mask_token_id"], written["block_size"]) == (3, 16)


def test_shards_with_an_index(tmp_path: Path) -> None:
    model = load_checkpoint(GOLDEN / "case_01")
    save_two_towers(model, tmp_path / "out", max_shard_bytes=300_000)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 310_000 for file in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.state_dict().values())
    assert index["weight_map"].keys() == headers(GOLDEN / "case_01").keys()
    assert_same(load_checkpoint(tmp_path / "out"), model)


def test_values_are_aligned_in_the_file(tmp_path: Path) -> None:
    """Guards readers that map the file: an odd count of bfloat16 values before float32 ones."""
    narrow, wide = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])
    pieces = [Piece("a", narrow, torch.bfloat16), Piece("b", wide, torch.float32)]
    write_checkpoint(tmp_path / "out", pieces, {}, None, 10**9)
    data = (tmp_path / "out/model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and header["b"]["data_offsets"][0] % 4 == 0
    loaded = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(loaded["a"], narrow.bfloat16()) and torch.equal(loaded["b"], wide)


def test_fewer_shards_leave_none_of_the_old_ones(tmp_path: Path) -> None:
    """Guards against old shards beside a new file: half of each could be loaded."""
    model = load_checkpoint(GOLDEN / "case_03")
    save_two_towers(model, tmp_path / "out", max_shard_bytes=200_000)
    save_two_towers(model, tmp_path / "out", extra_files={"tokenizer.json": b"{}"})
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_dtype_applies_to_all_but_routers(tmp_path: Path) -> None:
    save_two_towers(load_checkpoint(GOLDEN / "case_01"), tmp_path / "out", dtype=torch.bfloat16)
    for name, (_, dtype) in headers(tmp_path / "out").items():
        assert dtype == ("F32" if ".gate." in name else "BF16"), name
    model = load_checkpoint(tmp_path / "out", dtype=None)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_tied_model_stays_tied_and_names_its_heads(tmp_path: Path) -> None:
    """Guards readers that do not tie: without the tensor they start from a random head."""
    config = config_from_dict(
        config_to_dict(read_config(GOLDEN / "case_03")) | {"tie_word_embeddings": True}
    )
    model = TwoTower(config)
    state = load_checkpoint(GOLDEN / "case_03").state_dict()
    tied = {n: v for n, v in state.items() if not n.endswith("lm_head.weight")}
    model.load_state_dict(tied, strict=False)
    save_two_towers(model, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    assert again.config == config
    assert again.context_lm_head.weight is again.context_tower.embeddings.weight
    assert_same(again, model.eval())
    assert "lm_head.weight" in headers(tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_backbone_to_two_towers_and_back(tmp_path: Path, case: str) -> None:
    """Guards the way of every trained model: backbone, both towers, backbone again."""
    model = load_checkpoint(GOLDEN / case, towers="context", dtype=None)
    save_backbone(model, tmp_path / "one")
    assert all(n.startswith(("backbone.", "lm_head.")) for n in headers(tmp_path / "one"))
    both = load_checkpoint(tmp_path / "one", dtype=None)
    save_two_towers(both, tmp_path / "two")
    assert headers(tmp_path / "two").keys() == headers(GOLDEN / case).keys()
    save_backbone(load_checkpoint(tmp_path / "two", dtype=None), tmp_path / "three")
    assert_same(load_checkpoint(tmp_path / "three", dtype=None, towers="context"), model)


def test_one_tower_cannot_be_saved_as_two(tmp_path: Path) -> None:
    model = load_checkpoint(GOLDEN / "case_03", towers="context")
    with pytest.raises(ValueError, match="save it with save_backbone"):
        save_two_towers(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 must be at least 1"),
        ({"extra_files": {"../x": b""}}, r"'\.\./x' must be a plain file name"),
        ({"extra_files": {"model.safetensors": b""}}, "must be a plain file name"),
        ({"dtype": torch.int8}, "cannot be saved"),
    ],
)
def test_bad_arguments_are_one_clear_line(
    tmp_path: Path, arguments: dict[str, object], expected: str
) -> None:
    model = load_checkpoint(GOLDEN / "case_03")
    with pytest.raises(ValueError, match=expected):
        save_two_towers(model, tmp_path / "out", **arguments)  # type: ignore[arg-type]  # on purpose
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_not_replaced(tmp_path: Path) -> None:
    """Guards against `convert SRC ~`: the folder is exchanged as a whole."""
    (tmp_path / "letters.txt").write_text("dear")
    model = load_checkpoint(GOLDEN / "case_03")
    with pytest.raises(ValueError, match="is not empty and not a checkpoint"):
        save_two_towers(model, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        save_two_towers(model, tmp_path / "letters.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond: writes fail as on a full disk, half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    old = load_checkpoint(GOLDEN / "case_03")
    save_two_towers(old, tmp_path / "out", extra_files={"README.md": b"card"})
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with file_size_limit(100_000), pytest.raises(ValueError) as error:
        save_two_towers(load_checkpoint(GOLDEN / "case_01"), tmp_path / "out")
    assert "cannot be saved (File too large); what was there is unchanged" in str(error.value)
    assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_swap_brings_the_old_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_checkpoint(GOLDEN / "case_03")
    save_two_towers(model, tmp_path / "out")
    rename = Path.rename

    def fail_on_the_new_one(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_new_one)
    with pytest.raises(ValueError, match="Input/output error"):
        save_two_towers(model, tmp_path / "out", dtype=torch.bfloat16)
    monkeypatch.undo()
    assert_same(load_checkpoint(tmp_path / "out", dtype=None), model)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    """The state on disk after such a kill: the old folder set aside, the new one not in place."""
    model = load_checkpoint(GOLDEN / "case_03")
    save_two_towers(model, tmp_path / "out", extra_files={"README.md": b"card"})
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new/model.safetensors").write_bytes(b"half")
    assert_same(load_checkpoint(tmp_path / "out"), model)
    save_two_towers(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/README.md").read_bytes() == b"card"


SAVE_FOREVER = """
import sys
from twotower.checkpoint import load_checkpoint, save_two_towers
model = load_checkpoint(sys.argv[1])
print("ready", flush=True)
while True:
    save_two_towers(model, sys.argv[2], max_shard_bytes=50_000)
"""


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    """Guards against a half-written checkpoint after kill -9."""
    model = load_checkpoint(GOLDEN / "case_03")
    save_two_towers(model, tmp_path / "out")
    command = [sys.executable, "-c", SAVE_FOREVER, str(GOLDEN / "case_03"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.13)
        os.kill(process.pid, signal.SIGKILL)
    assert_same(load_checkpoint(tmp_path / "out"), model)
    save_two_towers(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
