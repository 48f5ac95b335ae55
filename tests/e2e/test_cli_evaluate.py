"""`twotower evaluate`: records, tables, files, bad input."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from twotower.checkpoint import load_checkpoint, save_backbone

pytest.importorskip("num2words")
pytest.importorskip("jsonschema")

import twotower
from tiny_checkpoint import make_checkpoint
from tiny_models import tiny_model
from tiny_text import tiny_tokenizer
from twotower import GenerateOptions, accelerate, loading
from twotower.cli import evaluate as evaluation
from twotower.cli.main import main
from twotower.lab.evaluate.suite import check, held_out

FLAGS = ["--items", "2", "--max-new-tokens", "20", "--categories", "math,tools"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("evaluate") / "model"))


def test_the_record_and_its_files(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert main(["evaluate", "--json", "--output", str(out), "--model", checkpoint, *FLAGS]) == 0
    printed, err = capsys.readouterr()
    record = json.loads(printed)
    assert set(record["modes"]) == {"ar", "diffusion", "speculative"} and err == ""
    assert list(record["categories"]) == ["math", "tools"]
    for modes in record["categories"].values():
        assert {"accuracy", "retention", "n"} <= set(modes["diffusion"]) and modes["ar"]["n"] == 2
    assert record["modes"]["ar"]["nfe"] == 0 and record["modes"]["diffusion"]["nfe"] > 0
    assert record["options"]["ar"]["max_new_tokens"] == 20
    # What ran, not "auto": speeds of two records compare only if it is the same.
    ran = accelerate(load_checkpoint(checkpoint), "auto").backend.name
    assert record["backend"] == ran
    assert record["versions"]["twotower"] == twotower.__version__
    stored = json.loads((out / "results.json").read_text())
    items = stored.pop("items")
    assert stored == record and len(items) == 4
    assert (
        sum(i["outputs"]["diffusion"]["nfe"] for i in items) == record["modes"]["diffusion"]["nfe"]
    )


def test_the_record_names_the_precision_of_the_weights(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: weights that were rounded for a run, and a record that says float32 because
    native passes compute in that."""
    flags = ["--model", checkpoint, "--items", "1", "--max-new-tokens", "4", "--categories", "math"]
    assert main(["evaluate", "--json", "--modes", "ar", "--dtype", "bfloat16", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"


def test_items_are_what_the_engine_writes(checkpoint: str, tmp_path: Path) -> None:
    """Silent failure: the modes' answers are mixed up, or judged against another item."""
    assert main(["evaluate", "--output", str(tmp_path), "--model", checkpoint, *FLAGS]) == 0
    items = json.loads((tmp_path / "results.json").read_text())["items"]
    model, tokenizer = load_checkpoint(checkpoint), twotower.load_tokenizer(checkpoint)
    documents = held_out("math", 2, seed=0)
    for item, document in zip(items[::2], documents, strict=True):
        assert item["prompt"] == document.prompt and item["category"] == "math"
        for mode, output in item["outputs"].items():
            options = GenerateOptions(mode=mode, max_new_tokens=20)
            (wanted,) = twotower.generate(model, [document.prompt], options, tokenizer)
            assert (output["text"], output["tokens"]) == (wanted.text, len(wanted.tokens))
            assert output["nfe"] == wanted.nfe
            assert output["correct"] == check(document, output["text"]).correct


def test_batches_give_the_same_texts(checkpoint: str, tmp_path: Path) -> None:
    texts = []
    for size in ("1", "3"):
        out = tmp_path / size
        flags = ["--batch-size", size, "--output", str(out), "--model", checkpoint, *FLAGS]
        assert main(["evaluate", *flags]) == 0
        items = json.loads((out / "results.json").read_text())["items"]
        items.sort(key=lambda item: (item["category"], item["index"]))
        texts.append([[o["text"] for o in item["outputs"].values()] for item in items])
    assert texts[0] == texts[1]


def test_the_sweep_varies_threshold_and_passes(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--sweep", "--json", "--model", checkpoint, *FLAGS]) == 0
    points = json.loads(capsys.readouterr().out)["sweep"]
    limits = {point["steps_per_block"]: point for point in points}
    assert {1, 2, 3, None} == set(limits)  # four passes fill a block of 4 anyway
    # One item of each category: a quarter of two, rounded up.
    assert {point["n"] for point in points} == {2} and "ar_accuracy" in points[0]
    assert limits[1]["tokens_per_nfe"] > limits[2]["tokens_per_nfe"] > limits[3]["tokens_per_nfe"]
    assert len({point["confidence_threshold"] for point in points}) >= 7


def test_the_sweep_is_printed(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Silent failure: minutes of sweeping of which a terminal shows nothing."""
    assert main(["evaluate", "--sweep", "--model", checkpoint, *FLAGS]) == 0
    _, _, table = capsys.readouterr().out.partition("diffusion with other settings (2 items)")
    limits = [line.split()[1] for line in table.splitlines() if re.match(r"0\.\d", line)]
    assert limits == ["-"] * 7 + ["1", "2", "3"]


def test_the_pair_is_said_in_words(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", checkpoint, "--modes", "ar", *FLAGS]) == 0
    assert "there is no retention" in " ".join(capsys.readouterr().out.split())


def test_a_decoding_flag_goes_to_the_modes_that_use_it(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: a mode that is measured with other options than were asked for."""
    asked = ["--min-p", "0.1", "--temp", "0.9", "--seed", "3", "--stop", r"\n", "--escape"]
    asked += ["--drafts", "denoiser", "--steps-per-block", "2", "--confidence-threshold", "0.6"]
    assert main(["evaluate", "--json", "--model", checkpoint, *FLAGS, *asked]) == 0
    used = json.loads(capsys.readouterr().out)["options"]
    for mode, found in used.items():
        assert (found["mode"], found["min_p"], found["temperature"]) == (mode, 0.1, 0.9)
        assert (found["seed"], found["stop"], found["max_new_tokens"]) == (3, ["\n"], 20)
    assert [used[mode]["confidence_threshold"] for mode in used] == [0.8, 0.6, 0.6]
    assert (used["speculative"]["drafts"], used["diffusion"]["steps_per_block"]) == ("denoiser", 2)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_narrow_terminal_loses_nothing(
    width: int,
    checkpoint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silent failure: columns of the table that a narrow window cuts off."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["evaluate", "--likelihood", "--model", checkpoint, *FLAGS]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    for name in ("acc %", "95 %", "kept %", "=ar", "t/NFE", "NFE", "t/ctx", "t/s", "x ar", "loops"):
        assert " ".join(text.split()).count(name) >= 3, name  # math, tools, all
    for name in ("ar", "diffusion", "speculative", "ar nats/token", "bound nats/token", "+-"):
        assert name in " ".join(text.split()), name
    assert "\u2026" not in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["evaluate", "--modes", "fast"], "modes: 'fast' is unknown"),
        (["evaluate", "--items", "0"], "items 0 must be at least 1"),
        (["evaluate", "--model", "/nowhere"], "/nowhere"),
        (
            ["evaluate", "--modes", "ar", "--confidence-threshold", "0.5"],
            "--confidence-threshold: no effect",
        ),
        (
            ["evaluate", "--modes", "ar,diffusion", "--remask", "random"],
            "--remask: no effect without predict-and-noise among --modes; leave it out",
        ),
        (["evaluate", "--logprobs", "1"], "unrecognized options: --logprobs"),
        (["evaluate", "--top-k", "4", "--items", "1"], "--top-k 4: has no effect at temperature 0"),
        (["evaluate", "--escape"], "--escape: no effect without --stop"),
        (["evaluate", "--modes", "ar", "--sweep"], "sweep"),
        (["evaluate", "--threads", "0"], "threads"),
        (["evaluate", "--output", "/dev/null/x"], "output: cannot write into /dev/null/x"),
        (["evaluate", "--items", "900", "--categories", "knowledge"], "items: 900 is more"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_an_interrupted_run_keeps_what_it_has(
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silent failure: Ctrl-C after an hour throws the hour away."""
    whole = evaluation.evaluate

    def stops_at_the_third(*args: object) -> Iterator[object]:
        for number, item in enumerate(whole(*args)):
            if number == 3:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(evaluation, "evaluate", stops_at_the_third)
    assert main(["evaluate", "--output", str(tmp_path), "--model", checkpoint, *FLAGS]) == 130
    out, err = capsys.readouterr()
    assert "math (2 items)" in out and "tools (1 items)" in out
    assert err == "interrupted: results of 3 of 4 items\n"
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["complete"] is False and record["modes"]["ar"]["n"] == len(record["items"]) == 3
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("library", ["matplotlib", "jsonschema"])
def test_a_missing_library_is_said_before_the_run(
    library: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silent failure: an hour of decoding that ends in an error instead of a report."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(evaluation, "load_with_bar", None)  # would fail with another error
    assert main(["evaluate", "--output", str(tmp_path)]) == 2
    assert f'{library} is not installed: pip install ".[eval]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "--modes", "ar,diffusion"], "--modes: diffusion needs a denoiser tower"),
        (["evaluate", "--modes", "speculative,mock-ar"], "--modes: mock-ar needs a denoiser"),
        (["evaluate", "--sweep"], "--sweep: needs the modes ar and diffusion"),
        (["evaluate", "--steps-per-block", "4"], "--steps-per-block: no effect without diffusion"),
        (["generate", "--mode", "diffusion", "a"], "--mode diffusion needs a denoiser tower"),
        (["generate", "--drafts", "denoiser", "a"], "--drafts denoiser needs a denoiser tower"),
        (["chat", "--mode", "posterior"], "--mode posterior needs a denoiser tower"),
        (["demo"], "has no denoiser, which this shows"),
        (["bench", "--modes", "ar,diffusion"], "--modes: has no effect on a real model"),
        (
            ["bench", "--backend", "eager", "--quantization", "int4"],
            "--backend eager: eager passes",
        ),
    ],
)
def test_what_a_backbone_cannot_do_is_said_before_weights_are_read(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silent failure: 60 GB are loaded for a mode that the model does not have."""
    model = tiny_model(hybrid_override_pattern="M*-")
    save_backbone(model, tmp_path / "m", extra_files=tiny_tokenizer().files())
    monkeypatch.setattr(loading, "load_checkpoint", None)
    assert main([arguments[0], "--model", str(tmp_path / "m"), *arguments[1:]]) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1]
