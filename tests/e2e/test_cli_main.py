"""The `twotower` command as a whole: verbs, flags, exit statuses, one line for what is wrong."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import save_file

from twotower.cli import inspect
from twotower.cli.generate import GenerateArguments
from twotower.cli.inspect import InspectOptions
from twotower.cli.main import VERBS, main, train_arguments
from twotower.cli.parse import parse
from twotower.cli.serve import ServeArguments
from twotower.documented import field_docs
from twotower.engine import EngineOptions, GenerateOptions
from twotower.train.options import TrainOptions

SOURCE = Path(__file__).parents[2] / "src"


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on stderr, which is one line, with nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1, (out, err)
    return err


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert main([]) == 0 and capsys.readouterr().out == out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a verb in the list that cannot be run."""
    assert main([verb, "-h"]) == 0
    out = capsys.readouterr().out
    assert f"usage: twotower {verb}" in out
    words = " ".join(out.replace("\u2502", " ").split())
    bare = re.findall(r"--[\w-]+ (?:\{[^}]*\}|[A-Z]+) \(default", words)
    assert bare == []  # a flag that says its default and nothing else
    # Python's spelling of a default, or of a type, is nothing that a user types.
    assert re.findall(r"default: (?:True|False|None)|\bSTR\b", words) == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("twotower 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demoo"], "'demoo' is not a verb"),
        (["--verbose"], "'--verbose' is not a verb"),
        (
            ["generate", "--tpo-k", "3"],
            "unrecognized options: --tpo-k; perhaps you meant --top-k",
        ),
        (["generate", "--logprobs", "x"], "--logprobs x must be a whole number;"),
        (["generate", "--max-new-tokens", "x"], "--max-new-tokens x must be a whole number"),
        (["generate", "-n", "x"], "-n x must be a whole number"),
        (["chat", "--temp=x"], "--temp x must be a number"),
        (["chat", "--mode", "x"], "use one of diffusion, speculative, posterior, predict-and"),
        (["demo", "--threads", "x"], "--threads x must be a whole number"),
        (["convert", "a", "b", "--activations", "x"], "--activations x is unknown; use int8;"),
        (["train", "backbone", "--betas", "0.9"], "--betas needs 2 values"),
        (["prepare", "--columns"], "--columns needs a value"),
        (["bench", "--prompts", "--json"], "--prompts needs a value"),
        (["bench", "--prompts", "a", "--json", "--prompts"], "--prompts needs a value"),
        (["adapt", "-m", "a"], "missing: --output DIR, --prompts; see"),
        (["adapt", "-m", "a", "-o", "a"], "missing: --prompts; see"),
        (["adapt", "-o", "a", "--prompts", "a"], "missing: --model TEXT; see"),
        (["train", "backbone", "--betas", "0.9", "x"], "--betas 0.9, x must be numbers"),
        (
            ["generate", "--mode", "magic"],
            "--mode magic is unknown; use one of diffusion, ",
        ),
        (["generate", "--seed", "x"], "--seed x must be a whole number"),
        (["chat", "--url", "http://a", "--threads", "2"], "--threads: is the server's with --url"),
        (["generate", "--seed"], "--seed needs a value; see"),
        (["convert"], "missing: SOURCE, TARGET; see twotower convert -h"),
        (["train"], "missing: --recipe"),
        (["train", "--options"], "--options needs a TOML file"),
        (["train", "backbone", "--steps", "0"], "--steps 0 must be at least 1"),
        (["inspect"], "inspect needs one model: a PATH, or --model"),
        (["demo", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["demo", "--speed", "0"], "--speed 0.0 must be a finite number above 0"),
        (["demo", "--speed", "inf"], "--speed inf must be a finite number above 0"),
        (["generate", "--temp", "inf", "a"], "--temp inf must be a finite number, at least 0.0"),
        (["generate", "-n=0", "a"], "-n 0 must be at least 1"),
        (["evaluate", "--max-num-seqs", "0"], "--max-num-seqs 0 must be at least 1"),
        (["plan", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["train", "backbone", "--max-num-seqs", "4"], "unrecognized options: --max-num-seqs"),
        (["chat", "--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["generate", "--threads", "0", "a"], "--threads 0 must be between 1 and 1024"),
        (["generate", "--quantization", "int8", "--backend", "eager", "a"], "--quantization int8:"),
        (["convert", "a", "b", "--to", "gguf", "--quantization", "int8"], "needs --to released or"),
        (["convert", "a", "b", "--group-size", "32"], "--group-size: no effect without"),
        (["train", "backbone", "--learning-rate", "inf"], "must be a finite number above 0"),
        (
            ["plan", "--dtype", "float64"],
            "--dtype float64 is unknown; use one of",
        ),
        (
            ["generate", "--device", "xpu:9", "a"],
            "--device xpu:9 is not on this",
        ),
        (["generate", "--denoiser-device", "meta", "a"], "--denoiser-device meta is not"),
        (["generate", "-m", "", "a"], "-m '' must be text that is not empty"),
        (["generate", "-n", "a: b"], "-n 'a: b' must be a whole number"),
        (["generate", "--json=true", "a"], "--json takes no value"),
        (["generate", "--ignore-eos=false", "a"], "--ignore-eos takes no value"),
        (["train", "backbone", "--no-compile=1"], "--no-compile takes no value"),
        (["generate", "--logit-bias", "x=1", "a"], "--logit-bias x=1 must be a token id, = and"),
        (["generate", "--threads", "99999", "a"], "--threads 99999 must be between 1 and 1024"),
        (
            ["generate", "--mode", "ar", "--denoiser-device", "cpu", "a"],
            "--denoiser-device: has no effect in mode ar",
        ),
        (
            ["generate", "--mode", "predict-and-noise", "--adaptive", "--schedule", "cosine", "a"],
            "--schedule: has no effect with adaptive",
        ),
        (["chat", "--api-key-env", "KEY"], "--api-key-env: no effect without --url"),
        (["demo", "--sample", "math", "-p", "a"], "--sample: has no effect with --prompt"),
        (["serve", "--filter", "("], "--filter: '(' is not a regular expression"),
        (["plan", "--block-size", "0"], "--block-size 0 must be at least 1"),
        (["plan", "-m", "shipped", "--expert-weights", "int8"], "--expert-weights: has no effect"),
        (["inspect", "nowhere"], "error: path: nowhere is not a file or folder"),
        (["convert", "nowhere", "a"], "error: source: nowhere is not a file or folder"),
        (["train", "backbone", "--options", "nowhere"], "--options: cannot read nowhere"),
        (
            ["train", "backbone", "--init", "a", "--preset", "tiny"],
            "--init: given together with --",
        ),
        (
            ["train", "backbone", "--eval-rows", "8", "--eval-every", "0"],
            "--eval-rows: no effect with --eval-every 0",
        ),
        (["prepare", "--shuffle", "2"], "give --input ... as well"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    line = only_line(capsys)
    assert line.startswith("error: ") and said in line and "None" not in line


def test_a_list_takes_the_values_of_all_its_flags() -> None:
    """Silent failure: a server without the first of two --filter, as the last one replaces it."""
    arguments = ["--filter", "a", "--port", "80", "--filter=b", "c"]
    assert parse(ServeArguments, "serve", arguments).filter == ("a", "b", "c")
    arguments = ["--eos-token-id", "5", "--eos-token-id", "6", "a", "--", "-b"]
    ends = parse(GenerateArguments, "generate", arguments)
    assert ends.given() == {"eos_token_id": (5, 6)} and ends.prompts == ("a", "-b")


@pytest.mark.parametrize("frame", ["lines", "blanks"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert"], "missing: SOURCE, TARGET; see twotower convert -h"),
        (
            ["demo", "--sped", "2"],
            "unrecognized options: --sped; perhaps you meant --speed FLOAT",
        ),
        (["demo", "--speed", "x"], "--speed x must be a number"),
    ],
)
def test_a_refusal_reads_the_same_in_a_terminal(
    arguments: list[str],
    said: str,
    frame: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against pieces of a frame, or colours, in the one line: tyro draws what stdout can."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(tyro._fmtlib, "_FORCE_UTF8_BOXES", frame == "lines")
    assert main(arguments) == 2
    assert only_line(capsys).startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("two\n  lines"), 2, "two lines"),
        (ValueError("a file's \x1b[2J"), 2, "a file's \ufffd[2J"),
        (ImportError("babel is not installed"), 2, "babel is not installed"),
        (OSError(28, "No space left on device", "there"), 2, "there: No space left on device"),
        (RuntimeError("alloc_cpu: can't allocate memory: 9 bytes"), 2, "not enough memory; use"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (AssertionError(), 1, "AssertionError"),
    ],
)
def test_an_error_is_one_line_with_its_status(
    error: Exception,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a traceback, and against a defect of ours that looks like the user's error."""

    def run(options: InspectOptions) -> int:
        raise error

    monkeypatch.setattr(inspect, "run", run)
    assert main(["inspect", "there"]) == status
    assert said in only_line(capsys)
    with pytest.raises(type(error)):
        main(["--debug", "inspect", "there"])


def test_an_error_is_no_longer_than_anyone_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a terminal against ten megabytes that a file calls the name of a tensor."""
    shutil.copytree(SOURCE / "twotower" / "assets", tmp_path / "model")
    name = "a" * 10**6
    save_file({name: torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    assert main(["generate", "-m", str(tmp_path / "model"), "-p", "a"]) == 2
    line = only_line(capsys)
    assert "tensors such as" in line and "known are" in line and len(line) < 2100


def test_ctrl_c_is_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: InspectOptions) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", run)
    assert main(["inspect", "there"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_warning_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: InspectOptions) -> int:
        warnings.warn("beware\nof this", stacklevel=2)
        return 0

    monkeypatch.setattr(inspect, "run", run)
    assert main(["inspect", "there"]) == 0
    assert only_line(capsys) == "warning: beware of this\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    """Guards against a traceback in `twotower ... | head`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower.cli.main", "-h"],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("verb", "given", "policy"),
    [("generate", "", "PASSIVE"), ("generate", "ACTIVE", "ACTIVE"), ("bench", "", "")],
)
def test_waiting_threads_sleep_unless_told_otherwise(verb: str, given: str, policy: str) -> None:
    """Guards against threads that spin for one that a busy machine does not let run, and against a
    benchmark that llama.cpp runs with threads put to sleep. The setting counts only if it is there
    before torch is."""
    code = (
        "import os, sys; from twotower.cli.main import main; print('torch' in sys.modules); "
        f"main(['{verb}', '-h']); print(os.environ.get('OMP_WAIT_POLICY', ''))"
    )
    own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    own |= {"OMP_WAIT_POLICY": given} if given else {}
    found = subprocess.run([sys.executable, "-c", code], env=own, check=True, capture_output=True)
    lines = found.stdout.decode().split("\n")
    assert (lines[0], lines[-2]) == ("False", policy)


def test_train_takes_a_recipe_and_a_file_whose_options_flags_override(tmp_path: Path) -> None:
    """Guards against a flag that the file silently overrules, or a file that is never read."""
    file = tmp_path / "options.toml"
    file.write_text("steps = 7\nbatch_size = 3\ncompile = true\nbetas = [0.8, 0.9]\n")
    for spelling in (["--options", str(file)], [f"--options={file}"]):
        arguments = train_arguments(["backbone", *spelling, "--steps", "9"])
        options = parse(TrainOptions, "train", arguments)
        assert options == TrainOptions(
            recipe="backbone", steps=9, batch_size=3, compile=True, betas=(0.8, 0.9)
        )


@pytest.mark.parametrize("width", [30, 60, 120])
def test_a_narrow_terminal_cuts_nothing_of_a_description(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards numbers that end in an ellipsis."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["inspect", "shipped"]) == 0
    out = capsys.readouterr().out
    assert "\u2026" not in out
    assert all(found in out for found in ("2,529,104", "2,733,584", "213.0", "float32"))


def test_a_decoding_flag_has_one_help_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: one verb explains a flag as it was before it was changed."""
    monkeypatch.setenv("COLUMNS", "2000")
    docs = field_docs(GenerateOptions)
    for verb in ("chat", "demo", "evaluate", "generate"):
        assert main([verb, "-h"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for name in ("confidence_threshold", "steps_per_block", "first_token", "min_p"):
            assert f"{docs[name]} (default: " in shown, verb
    monkeypatch.setenv("COLUMNS", "80")
    said = f"--batch-size INT {field_docs(EngineOptions)['batch_size']} (default: "
    for verb in ("adapt", "evaluate", "generate", "plan", "serve"):
        assert main([verb, "-h"]) == 0
        assert said in " ".join(capsys.readouterr().out.replace("\u2502", " ").split()), verb
