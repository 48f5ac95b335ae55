"""`twotower adapt` from the command line: one run to its end, and what it refuses."""

import json
from pathlib import Path

import pytest

from tiny_checkpoint import make_text_checkpoint
from twotower.cli.main import main
from twotower.engine.fork_server import Root


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
    command += ["--max-tokens", "12", "--draft-vocab", "0", "--minutes", "0.3", "--json"]
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


GOOD = b"".join(b'{"prompt": "a%d"}\n' % i for i in range(30))
FEW = b"".join(GOOD.splitlines(True)[:18])


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (b"", [], "hold no prompt"),
        (b'{"x": 1}\n', [], "line 1 has none of prompt, question"),
        (b"\xff\xfe\n", [], "is not"),
        (b'{"prompt": "\\ud800"}\n', [], "q.jsonl line 1 is not UTF-8 text"),
        (b'{"prompt": [300]}\n', [], "q.jsonl line 1 has token 300 outside the vocabulary"),
        (b'{"prompt": "a"}\n' * 60, [], "1 of 60 are usable, at least 22 are needed; left out"),
        (FEW + b'\n{"text": " "}\n{"prompt": ""}\n' * 9, [], "18 of 36 are usable"),
        (
            GOOD,
            ["--max-prompt-tokens", "1"],
            "needed; left out are blank and repeated ones, and those of more than 1 tokens",
        ),
        (b"".join(GOOD.splitlines(True)[:21]), [], "21 of 21 are usable"),
        (GOOD, ["--layers", "99"], "--layers 99 must be at most"),
        (GOOD, ["--minutes", "nan"], "--minutes nan"),
        (GOOD, ["--stage", "train"], "run the stage answers first"),
        (GOOD, ["--denoiser-device", "cpu"], "unrecognized options: --denoiser-device"),
        (GOOD, ["--stage", "measure"], "has no denoiser; run the stage train first"),
        (GOOD, ["--stage", "train", "--json"], "--json: has no effect with --stage train"),
        (
            GOOD,
            ["--denoiser", "x", "--layers", "1"],
            "--layers: has no effect with --denoiser ...,",
        ),
        (b"", ["--bigram-rank", "1000000"], "--bigram-rank 1000000 must be between 0 and 1024"),
        (b"", ["--block-size", "65"], "--block-size 65 must be between 2 and 64"),
        (b"", ["--batch-size", "2000"], "--batch-size 2000 must be between 1 and 1024"),
        (b"", ["--blocks-per-answer", "2000"], "--blocks-per-answer 2000 must be between 1 and"),
        (GOOD, ["--max-tokens", str(10**15)], f"--max-tokens {10**15}: an answer needs about"),
        (b"", ["--out", "/dev/null/d"], "--out: /dev/null/d: its parent cannot be written"),
        (b"", ["--work", "/dev/null/w"], "--work: /dev/null/w: its parent cannot be written"),
        (
            GOOD,
            ["--denoiser", __file__],
            "test_cli_adapt.py is a file of another kind; give a fold",
        ),
        (GOOD, ["--denoiser", "x"], "--denoiser: x is not a file or folder"),
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


def test_more_processes_are_refused(
    backbone: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards torchrun: its second process was told to wait for the first, or to go elsewhere."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    file = prompts_file(tmp_path, 30)
    command = ["adapt", "-m", backbone, "--prompts", str(file), "--out", str(tmp_path / "d")]
    assert main(command) == 2
    assert "one process; start it without torchrun" in capsys.readouterr().err


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


def test_prompts_share_the_process_of_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards runs beside others: each prompt had a fork of its own, thousands in all, of which each
    must answer within a second; on two busy cores 3,000 took four minutes, or ended the run.
    """
    forks, copy = [], Root.copy
    monkeypatch.setattr(Root, "copy", lambda root: forks.append(root) or copy(root))
    folder = make_text_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    command = ["adapt", "-m", str(folder), "--prompts", str(prompts_file(tmp_path, 30))]
    command += ["--layers", "1", "--max-tokens", "4", "--stage", "answers"]
    assert main([*command, "--out", str(tmp_path / "d")]) == 0
    assert len(forks) == 1


@pytest.mark.parametrize("name", ["out", "work"])
@pytest.mark.parametrize("place", ["model", "file", "prompts"])
def test_places_of_other_files_are_refused_and_stay(
    name: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the user's model: --out of its folder overwrote it, after all the training."""
    model = make_text_checkpoint(tmp_path / "m")
    (tmp_path / "p").mkdir()
    file = prompts_file(tmp_path / "p", 30)
    where = {"model": model, "file": file, "prompts": file.parent}[place]
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    places = {"out": tmp_path / "d", name: where}
    command = ["adapt", "-m", str(model), "--prompts", str(file), "--minutes", "0.001"]
    assert main([*command, *(str(x) for key in places for x in (f"--{key}", places[key]))]) == 2
    error = capsys.readouterr().err
    assert f"--{name}" in error and "give a" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"m", "p"}


def test_prompts_that_were_trained_on_are_not_measured(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the measurement: with another seed other prompts are kept, which were answered."""
    file = tmp_path / "q.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD)  # with a byte order mark, as Windows writes it
    command = ["adapt", "-m", backbone, "--prompts", str(file), "--out", str(tmp_path / "d")]
    command += ["--layers", "1", "--max-tokens", "6"]
    assert main([*command, "--stage", "answers"]) == 0
    assert "27 of 27 answers" in capsys.readouterr().err
    assert main([*command, "--stage", "train", "--minutes", "0.1"]) == 0
    command += ["--stage", "measure", "--json", "--minutes", "9"]
    for seed in range(1, 30):
        status = main([*command, "--seed", str(seed)])
        printed = capsys.readouterr()
        if status == 2:
            assert "all that were kept to measure have been trained on" in printed.err
            break
        assert json.loads(printed.out)["tasks"][0]["prompts"] < 3
    assert status == 2
    assert main(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tasks"][0]["prompts"] == 3
    assert "measure: 3 of 3 prompts" in printed.err


def test_an_interrupted_run_says_what_it_keeps(
    backbone: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards hours: who stops a run and hears nothing starts from the beginning elsewhere."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("twotower.adapt.run.train", stopped)
    file, out = prompts_file(tmp_path, 300), tmp_path / "denoiser"
    command = ["adapt", "-m", backbone, "--prompts", str(file), "--out", str(out), "--layers", "1"]
    assert main([*command, "--max-tokens", "12", "--minutes", "0.1"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"interrupted: {out}-work keeps") and last.endswith("continues")
