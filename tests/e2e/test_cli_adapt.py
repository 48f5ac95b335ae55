"""`twotower adapt` from the command line: one run to its end, and what it refuses."""

import json
from pathlib import Path

import pytest

from tiny_checkpoint import make_text_checkpoint
from twotower.cli.main import main


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_text_checkpoint(tmp_path_factory.mktemp("model") / "m"))


def prompts_file(folder: Path, count: int) -> Path:
    file = folder / "q.jsonl"
    lines = [json.dumps({"question": f"What is {i}?"}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n\n")
    return file


def test_a_run_ends_with_a_denoiser_that_decodes(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the whole command: stages, the estimate, the report, and the folder that it leaves."""
    file, out = prompts_file(tmp_path, 300), tmp_path / "denoiser"
    command = ["adapt", "-m", backbone, "--prompts", str(file), "--out", str(out), "--layers", "1"]
    command += ["--max-tokens", "12", "--draft-vocab", "0", "--minutes", "0.2", "--json"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "tokens of answers" in printed.err and "blocks of training" in printed.err
    report = json.loads(printed.out)
    assert report["tasks"][0]["task"] == "q"
    assert report["tasks"][0]["equal"] == report["tasks"][0]["prompts"] > 0
    assert json.loads((out / "config.json").read_text())["backbone"] == Path(backbone).name
    ask = ["generate", "-m", backbone, "--denoiser", str(out), "-n", "8", "--json", "What is 3?"]
    assert main(ask) == 0
    drafted = json.loads(capsys.readouterr().out)["results"][0]["tokens"]
    assert (
        main(["generate", "-m", backbone, "--mode", "ar", "-n", "8", "--json", "What is 3?"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["results"][0]["tokens"] == drafted


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (b"", [], "hold no prompt"),
        (b'{"x": 1}\n', [], "line 1 has none of prompt, question"),
        (b"\xff\xfe\n", [], "is not"),
        (b'{"prompt": "a"}\n' * 5, [], "are usable, and 20 are needed"),
        (b'{"prompt": "a"}\n' * 30, ["--layers", "99"], "--layers 99 must be at most"),
        (b'{"prompt": "a"}\n' * 30, ["--minutes", "nan"], "--minutes nan"),
        (b'{"prompt": "a"}\n' * 30, ["--stage", "train"], "run the stage answers first"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    backbone: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    flags: list[str],
    said: str,
) -> None:
    """Guards hours that are spent before a fault is told."""
    file = tmp_path / "q.jsonl"
    file.write_bytes(content)
    command = [
        "adapt",
        "-m",
        backbone,
        "--prompts",
        str(file),
        "--out",
        str(tmp_path / "d"),
        *flags,
    ]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_template_that_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards templates that people wrote: what they refuse is no defect of ours."""
    folder = make_text_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only pairs of turns') }}")
    command = ["adapt", "-m", str(folder), "--prompts", str(prompts_file(tmp_path, 30))]
    assert main([*command, "--out", str(tmp_path / "d")]) == 2
    error = capsys.readouterr().err
    assert "only pairs of turns" in error and "defect" not in error and error.count("\n") == 1
