"""`twotower generate --output`: order, bad lines, kill and resume, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import twotower
from tiny_checkpoint import make_checkpoint
from twotower.checkpoint import load_checkpoint
from twotower.cli import offline, output_file
from twotower.cli import prompts as prompt_files
from twotower.cli.main import main
from twotower.cli.output_file import OutputFile, read_lines

SHAPE = ["--max-new-tokens", "6", "--ignore-eos", "--batch-size", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("offline") / "model"))


def write_lines(file: Path, records: list[object]) -> Path:
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


def prompts(count: int) -> list[object]:
    """Texts of different lengths, every third with options of its own."""
    own = [{}, {"mode": "ar", "max_new_tokens": 9}, {"temperature": 0.9, "seed": 7}]
    return [{"prompt": "abc" * (1 + i % 5), "id": f"n{i}", **own[i % 3]} for i in range(count)]


def answer(source: Path, target: Path, checkpoint: str, *flags: str) -> int:
    given = ["--input", str(source), "--output", str(target), "--model", checkpoint]
    return main(["generate", *given, *SHAPE, *flags])


def records(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_results_are_the_librarys_in_the_order_of_the_input(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against results that are handed to the wrong line when rows end out of order."""
    lines = prompts(11)
    source = write_lines(tmp_path / "in.jsonl", lines)
    source.write_text(source.read_text().replace('{"prompt"', '\n{"prompt"', 1))  # a blank line
    assert answer(source, tmp_path / "out.jsonl", checkpoint) == 0
    out, err = capsys.readouterr()
    assert out == "" and "11 lines in " in err and "0 of 11 refused" in err
    model, tokenizer = load_checkpoint(checkpoint), twotower.load_tokenizer(checkpoint)
    found = records(tmp_path / "out.jsonl")
    assert [record["line"] for record in found] == list(range(2, 13))
    for line, record in zip(lines, found, strict=True):
        assert isinstance(line, dict)
        own = {k: v for k, v in line.items() if k not in ("prompt", "id")}
        o = twotower.GenerateOptions(**{"max_new_tokens": 6, "ignore_eos": True, **own})
        (expected,) = twotower.generate(model, [line["prompt"]], o, tokenizer)
        assert record.pop("key") and record.pop("line")
        assert record == {
            "id": line["id"],
            "text": expected.text,
            "tokens": expected.tokens,
            "nfe": expected.nfe,
            "context_forwards": expected.context_forwards,
            "lookup_tokens": expected.lookup_tokens,
            "denoiser_tokens": expected.denoiser_tokens,
            "finish_reason": "length",
        }


def test_the_command_s_options_count_beside_a_line_s_own(checkpoint: str, tmp_path: Path) -> None:
    """Guards lines that are refused for an option that they never named: the command's are for
    lines that can use them."""
    lines: list[object] = [
        {"prompt": "a"},
        {"prompt": "a", "mode": "ar"},
        {"prompt": "a", "temperature": 0},
        {"prompt": "a", "eos_token_id": 5, "max_tokens": 1},
    ]
    source, target = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    flags = ["--mode", "diffusion", "--confidence-threshold", "0.5", "--temperature", "1"]
    assert answer(source, target, checkpoint, *flags, "--top-k", "5") == 0
    found = records(target)
    assert not any("error" in record for record in found)
    assert [record["nfe"] == 0 for record in found] == [False, True, False, False]
    assert len(found[3]["tokens"]) == 1  # in the command line's other spelling


BAD = {
    2: (b'{"prompt": "a"', "not JSON"),
    3: (b'{"prompt": ""}', "the prompt is empty; give at least one character"),
    4: (
        b'{"prompt": "a", "temprature": 1}',
        "'temprature' is not an option, perhaps temperature",
    ),
    6: (b'{"prompt": "a", "temperature": "hot"}', "temperature='hot' must be a number"),
    7: (b'"a"', 'not an object; write {"prompt": ...}'),
    8: (b'{"prompt": "\xe9"}', "not UTF-8 text"),
    9: (b'{"prompt": [1, 41]}', "token 41 outside the vocabulary"),
    10: (b'{"text": "a"}', 'the line has no "prompt"'),
    11: (b'{"prompt": "a", "mode": "fast"}', "mode='fast' is unknown"),
    12: (b'{"prompt": "\\ud800"}', "the line is not UTF-8 text"),
    13: (b'{"prompt": "a", "eos_token_id": 99}', "eos_token_id=99 is outside"),
    14: (
        b'{"prompt": "a", "max_tokens": 3, "max_new_tokens": 3}',
        "max_new_tokens: is given in two spellings",
    ),
}


@pytest.mark.parametrize("window", [1, 16])
def test_a_bad_line_is_reported_and_the_rest_goes_on(
    window: int,
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards long runs: one broken line must neither stop them nor go by unseen. A small window
    guards against waiting for ever behind lines that need no decoding."""
    monkeypatch.setattr(offline, "_WINDOW", window)
    good = b'{"prompt": "ab"}'
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(BAD.get(n, (good, ""))[0] for n in range(1, 16)) + b"\n")
    assert answer(source, tmp_path / "out.jsonl", checkpoint) == offline.REFUSED_LINES
    err = capsys.readouterr().err
    found = records(tmp_path / "out.jsonl")
    assert [record["line"] for record in found] == list(range(1, 16))
    for number, record in enumerate(found, 1):
        if number in BAD:
            assert BAD[number][1] in str(record["error"]), record
            assert f"line {number}: {record['error']}\n" in err
        else:
            assert record["text"]
    assert "12 of 15 refused" in err
    # a run that has nothing left to do still says that the file is not clean
    assert answer(source, tmp_path / "out.jsonl", checkpoint) == offline.REFUSED_LINES


def test_a_prompt_too_long_for_memory_is_a_bad_line(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twotower import memory

    monkeypatch.setattr(memory, "available_bytes", lambda *_: 10**6)
    lines = [{"prompt": "a"}, {"prompt": [5] * 9000}, {"prompt": "b"}]
    source = write_lines(tmp_path / "in.jsonl", lines)
    assert answer(source, tmp_path / "out.jsonl", checkpoint) == offline.REFUSED_LINES
    first, second, third = records(tmp_path / "out.jsonl")
    assert first["text"] and third["text"]
    assert "a prompt of 9000 tokens in 1 rows needs" in str(second["error"])


def test_a_killed_run_goes_on_to_the_same_bytes(checkpoint: str, tmp_path: Path) -> None:
    """Guards resumption: a line lost, repeated or half written at the kill."""
    source = write_lines(tmp_path / "in.jsonl", prompts(60))
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert answer(source, whole, checkpoint) == 0
    flags = ["--input", str(source), "--output", str(killed), "--model", checkpoint, *SHAPE]
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower.cli.main", "generate", *flags], stderr=subprocess.DEVNULL
    )
    while not killed.exists() or killed.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    part = killed.read_bytes()
    assert part.count(b"\n") < 60
    assert whole.read_bytes().startswith(part)
    assert answer(source, killed, checkpoint) == 0
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("cut", [0, 1, 40, -1, -7])
def test_a_broken_last_line_is_written_again(cut: int, checkpoint: str, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", prompts(4))
    target = tmp_path / "out.jsonl"
    assert answer(source, target, checkpoint) == 0
    whole = target.read_bytes()
    target.write_bytes(whole[:cut])
    assert answer(source, target, checkpoint) == 0
    assert target.read_bytes() == whole


def test_lines_added_to_the_input_are_answered_by_the_next_run(
    checkpoint: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", prompts(3))
    target = tmp_path / "out.jsonl"
    assert answer(source, target, checkpoint) == 0
    before = target.read_bytes()
    write_lines(source, prompts(5))
    assert answer(source, target, checkpoint) == 0
    assert target.read_bytes().startswith(before) and len(records(target)) == 5


def test_a_file_of_another_run_is_refused(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a file whose halves were decoded differently."""
    source, target = write_lines(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    assert answer(source, target, checkpoint) == 0
    before = target.read_bytes()
    other = make_checkpoint(tmp_path / "other", max_new_tokens=5)
    changed = write_lines(tmp_path / "changed.jsonl", [*prompts(2), {"prompt": "c"}])
    shorter = write_lines(tmp_path / "shorter.jsonl", prompts(2))
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"text": "mine"}\n')
    capsys.readouterr()
    for arguments, said in [
        ((source, target, checkpoint, "--temperature", "0.5"), "line 1 was written with another"),
        ((changed, target, checkpoint), "line 3 was written from another input"),
        ((shorter, target, checkpoint), "line 3 was written from another input"),
        ((source, foreign, checkpoint), "line 1 was not written by this command"),
    ]:
        assert answer(*arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and said in err
    assert target.read_bytes() == before
    assert foreign.read_text() == '{"text": "mine"}\n'
    # the same weights elsewhere are the same model: what counts is what they say
    assert answer(source, target, str(other)) == 0


def test_another_models_file_is_refused(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    assert answer(source, target, checkpoint) == 0
    other = make_checkpoint(tmp_path / "other")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-100:] = bytes(100)
    (other / "model.safetensors").write_bytes(content)
    assert answer(source, target, str(other)) == 2
    assert "with another model or other options" in capsys.readouterr().err


def test_an_empty_file_has_an_empty_answer(checkpoint: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for content in ("", "\n\n"):
        source.write_text(content)
        assert answer(source, target, checkpoint) == 0
        assert target.read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "{tmp}/in.jsonl", "--output", "{tmp}/no/out.jsonl"], "output: cannot write"),
        (["--input", "{tmp}/in.jsonl", "--output", "{tmp}"], "output: cannot write"),
        (["--input", "{tmp}/none.jsonl", "--output", "{tmp}/o"], "input: cannot read"),
        (
            ["--input", "{tmp}/in.txt", "--output", "{tmp}/o"],
            "give one as --input FILE.jsonl",
        ),
        (["a", "--output", "{tmp}/o"], "give one as --input FILE.jsonl"),
        (["a", "--input", "{tmp}/in.jsonl", "--output", "{tmp}/o"], "leave out other prompts"),
        (["--json", "--input", "{tmp}/in.jsonl", "--output", "{tmp}/o"], "--json"),
        (["a", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str],
    said: str,
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_lines(tmp_path / "in.jsonl", prompts(2))
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["generate", *given, "--model", checkpoint]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and said in err
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_one_line(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", prompts(2))
    target = tmp_path / "out.jsonl"
    target.symlink_to("/dev/full")
    assert answer(source, target, checkpoint) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "output: cannot write" in err


def test_memory_holds_a_window_of_lines(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards files larger than memory: a slow first line must not let the rest be read."""
    monkeypatch.setattr(offline, "_WINDOW", 2)
    most = 0

    class Watched(offline.Window):
        def _set(self, entry: offline._Entry, result: dict[str, object]) -> None:
            nonlocal most
            most = max(most, len(self._entries))
            super()._set(entry, result)

    monkeypatch.setattr(offline, "Window", Watched)
    lines = [{"prompt": "a", "max_new_tokens": 40}, *({"prompt": "b"} for _ in range(40))]
    source = write_lines(tmp_path / "in.jsonl", lines)
    assert answer(source, tmp_path / "out.jsonl", checkpoint) == 0
    assert most == 6  # two for each of three slots
    assert len(records(tmp_path / "out.jsonl")) == 41


def test_two_runs_do_not_write_one_file(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against lines that are written twice, and a file that no run goes on with."""
    source, target = write_lines(tmp_path / "in.jsonl", prompts(2)), tmp_path / "out.jsonl"
    with OutputFile(target):
        assert answer(source, target, checkpoint) == 2
        assert "output: " in (err := capsys.readouterr().err) and "by another run" in err
        assert target.read_bytes() == b""
    assert answer(source, target, checkpoint) == 0
    assert len(records(target)) == 2
    with OutputFile(Path("/dev/null")), OutputFile(Path("/dev/null")):  # no file of results
        pass


def test_a_very_long_line_is_refused_as_it_is_read(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards memory: a line of 50 MB took 9.5 GB before it was refused."""
    monkeypatch.setattr(output_file, "MAX_LINE_BYTES", 1000)
    lines = [b'{"prompt": "a"}', b'{"prompt": "' + b"a" * 300_000 + b'"}', b" " * 3000]
    exact = b'{"prompt": "' + b"a" * 986 + b'"}'
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([*lines, exact, b'{"prompt": "b"}']))
    assert len(exact) == 1000
    found = list(read_lines(source))
    assert [line.number for line in found] == [1, 2, 3, 4, 5]
    assert [line.content is None for line in found] == [False, True, True, False, False]
    assert len({line.digest for line in found}) == 5
    target = tmp_path / "out.jsonl"
    assert answer(source, target, checkpoint) == offline.REFUSED_LINES
    results = records(target)
    assert ["error" in result for result in results] == [False, True, True, False, False]
    assert "longer than" in str(results[1]["error"])
    assert answer(source, target, checkpoint) == offline.REFUSED_LINES
    assert records(target) == results, "the same lines are found again"
    source.write_bytes(source.read_bytes().replace(b"a" * 300_000, b"a" * 299_999))
    assert answer(source, target, checkpoint) == 2


def test_long_prompts_of_other_kinds_are_refused(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(output_file, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(prompt_files, "MAX_LINE_BYTES", 1000)
    for name, content in (("a.txt", "a" * 1001), ("a.jsonl", json.dumps({"prompt": "a" * 1001}))):
        (tmp_path / name).write_text(content)
        given = ["--input", str(tmp_path / name), "--model", checkpoint, *SHAPE]
        assert main(["generate", *given]) == 2
        assert "is longer than" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ['"\\ud800"', "[" * 5000 + "]" * 5000])
def test_an_id_that_cannot_be_written_is_a_bad_line(
    bad: str, checkpoint: str, tmp_path: Path
) -> None:
    """Guards a run that would stop at this line, every time."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{{"prompt": "a", "id": {bad}}}\n{{"prompt": "a"}}\n')
    assert answer(source, target, checkpoint) == offline.REFUSED_LINES
    assert ["error" in record for record in records(target)] == [True, False]


def test_what_an_error_quotes_is_short(checkpoint: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    long = "x" * 100_000
    write_lines(source, [{"prompt": "a", "mode": long}, {"prompt": "a", long: 1}])
    assert answer(source, target, checkpoint) == offline.REFUSED_LINES
    assert all(len(str(record["error"])) < 400 for record in records(target))
