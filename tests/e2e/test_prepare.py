"""`twotower prepare` as a user runs it: raw files to a shard that trains, kills, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tiny_training import tiny_options
from twotower.cli.main import main
from twotower.train.loop import train_steps
from twotower.train.run_folder import RunFolder, read_metrics
from twotower.train.shard import Shard

SOURCE = Path(__file__).parents[2] / "src"


def prepare(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments)])


def write_inputs(folder: Path) -> None:
    """Three inputs: JSONL of pairs, a folder of text, Parquet with columns of its own."""
    records = [{"prompt": f"Say {i % 10}: ", "completion": f"it is {i % 10}."} for i in range(400)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "notes").mkdir()
    for name in ("b.txt", "a.md"):
        text = "\n\n".join(f"{name} has line {i}\nand another" for i in range(100))
        (folder / "notes" / name).write_text(text)
    table = pyarrow.table({"text": [f"row {i} of a table " * 9 for i in range(300)]})
    pyarrow.parquet.write_table(table, folder / "rows-1.parquet")


def test_raw_files_become_a_shard_that_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: the shares are not those asked for, or the shard does not train."""
    write_inputs(tmp_path)
    out = tmp_path / "data" / "mixed"
    inputs = [tmp_path / "pairs.jsonl", tmp_path / "notes", tmp_path / "rows-*.parquet"]
    weights = ["pairs=2", "notes=1", f"{inputs[2]}=1"]
    files = ["--vocab-size", 270, "--out", out]
    assert prepare("--input", *inputs, "--weights", *weights, "--tokens", 9000, *files) == 0
    said, errors = capsys.readouterr()
    assert re.match(rf"{out}: \d+ tokens in \d+ documents \(pairs (49|50)\.\d%, notes 2[45]", said)
    assert errors == ""
    shard = Shard(out)
    assert 9000 <= shard.meta.num_tokens < 9200
    for name, share in zip(["pairs", "notes", str(inputs[2])], [0.5, 0.25, 0.25], strict=True):
        assert shard.meta.sources[name] / shard.meta.num_tokens == pytest.approx(share, abs=0.03)
    options = tiny_options(out, tmp_path / "run", steps=30, learning_rate=0.02)
    for _ in train_steps(options):
        pass
    losses = [line["loss"] for line in read_metrics(RunFolder(options.run_folder).metrics)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    """Silent failure: a run cannot be repeated because its data cannot."""
    write_inputs(tmp_path)
    command = ["--input", tmp_path, "--shuffle", 50, "--vocab-size", 270]
    for name, seed in [("one", 1), ("two", 1), ("three", 2)]:
        assert prepare(*command, "--seed", seed, "--out", tmp_path.parent / name) == 0
    one, two, three = (
        {file.name: file.read_bytes() for file in (tmp_path.parent / name).iterdir()}
        for name in ("one", "two", "three")
    )
    assert one == two and len(one) == 5
    assert one["tokens.bin"] != three["tokens.bin"]


def test_a_switch_that_would_help_is_named_as_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a remedy that the library spells for Python, `overwrite=True`."""
    write_inputs(tmp_path)
    command = ["--input", tmp_path / "pairs.jsonl", "--vocab-size", 270, "--out", tmp_path / "x"]
    assert prepare(*command) == 0 and prepare(*command) == 2
    assert capsys.readouterr().err.endswith("; choose another folder or --overwrite\n")


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "twotower.cli.main", "prepare", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_leaves_the_shard_and_the_next_run_is_whole(tmp_path: Path) -> None:
    """Silent failure: after `kill -9` the shard that was there is gone, or remains of the broken
    run get into the next one.
    """
    write_inputs(tmp_path)
    out, expected = tmp_path / "data", tmp_path / "expected"
    command = ["--input", tmp_path / "pairs.jsonl", "--vocab-size", 270]
    assert prepare(*command, "--tokens", 1000, "--out", out) == 0
    before = Shard(out).meta

    # The built-in corpus as well, which does not end: the process is surely at it when killed.
    endless = ["--tokens", 10**12, "--tokenizer", out, "--out", out]
    process = start(*endless, "--overwrite")
    deadline = time.monotonic() + 60
    written = tmp_path / ".data.new" / "tokens.bin"
    while not written.exists() or written.stat().st_size < 10_000:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / ".data.new").is_dir()
    assert Shard(out).meta == before

    assert prepare(*command, "--out", out, "--overwrite") == 0
    assert prepare(*command, "--out", expected) == 0
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in expected.iterdir()
    }
    assert not (tmp_path / ".data.new").exists() and not (tmp_path / ".data.old").exists()


BAD = {
    "a.jsonl": (b'{"text": "a"}\n{"text": }\n', "a.jsonl line 2 is not JSON"),
    "b.jsonl": (b'{"body": "a"}\n', "b.jsonl line 1 has no column"),
    "c.parquet": (b"PAR1 and no more", "c.parquet cannot be read, it is cut or damaged"),
    "d.txt": (b"", "d.txt is empty"),
    "e.txt": (b"\n \n", "e.txt holds no documents"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    assert prepare("--input", tmp_path / name, "--out", tmp_path / "out") == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: --input: ") and err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == [name]
