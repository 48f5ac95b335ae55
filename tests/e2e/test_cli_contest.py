"""`twotower bench` on a backbone: a contest of processes, its record and refusals."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("num2words")
pytest.importorskip("fastapi")

from tiny_models import tiny_config
from tiny_text import byte_tokenizer
from twotower import TwoTower
from twotower.checkpoint import save_backbone
from twotower.cli.main import main
from twotower.lab.bench.contestant import Contestant
from twotower.model.initialise import randomise

LINES = [
    {"question": "the secret is"},
    {"turns": ["the secret", "and then"]},
    {"prompt": "is here"},
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("contest") / "model"
    model = TwoTower(
        tiny_config(hybrid_override_pattern="M*-", hidden_size=32, vocab_size=320), towers="context"
    )
    randomise(model, 3)
    save_backbone(model, folder, extra_files=byte_tokenizer().files())
    return str(folder)


def write(folder: Path, *lines: object) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_a_backbone_races_in_processes(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: a contestant that could not start is missing without a word, or answers get
    into one another."""
    lines = ({"prompt": " "}, *LINES)
    flags = ["--model", backbone, "--prompts", write(tmp_path, *lines), "--quantization", "int4"]
    flags += ["--max-new-tokens", "24", "--items", "4", "--threads", "1"]
    assert main(["bench", "--json", *flags, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "1 of 4 prompts are left out: blank ones" in printed.err
    record = json.loads(printed.out)
    assert record["prompts"] == 3
    ours = [r for r in record["contestants"] if r["engine"] == "twotower"]
    assert [r["mode"] for r in ours] == ["ar", "speculative"]
    assert all(r["same_as_plain"] == r["n"] == 3 and r["decode_ms"] > 0 for r in ours)
    told = " ".join(record["missing"])
    theirs = [r["mode"] for r in record["contestants"] if r["engine"] == "llama.cpp"]
    assert "plain" in theirs or "llama.cpp int4 plain: " in told or "llama.cpp int4: " in told
    saved = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert saved["contestants"] == record["contestants"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"words": "x"}, "line 1 has none of prompt, question, instruction, text, turns"),
        ({"prompt": [1.5]}, "line 1 has none of prompt"),
        (5, "line 1 has none of prompt"),
    ],
)
def test_prompts_that_cannot_be_used(
    line: object, told: str, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--model", backbone, "--prompts", write(tmp_path, line)]) != 0
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", [["--sizes", "32M"], ["--repeats", "2"], ["--no-baselines"]])
def test_options_of_the_other_benchmark_are_refused(
    flag: list[str], backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: a user thinks that fewer repeats made the run faster."""
    assert main(["bench", "--model", backbone, *flag]) == 2
    assert "has no effect on a real model; leave it out" in capsys.readouterr().err


def test_a_contestant_whose_contest_has_ended_is_silent() -> None:
    """Silent failure: none, but the terminal of a bench that was ended fills with tracebacks of
    processes that nobody knows."""
    who = Contestant(
        engine="twotower", quantization="none", mode="ar", file="nowhere", threads=1, context=9
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower.lab.bench.contestant"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(json.dumps(asdict(who)))
    assert process.returncode == 0 and said == ""
