"""`twotower demo`: the figures, the plain form, and the pictures that a terminal shows."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

import twotower
from tiny_checkpoint import make_checkpoint
from tiny_models import tiny_model
from tiny_options import options_of
from tiny_text import tiny_tokenizer
from twotower import Completion
from twotower.checkpoint import load_checkpoint
from twotower.cli.comparison import Measured, print_comparison, summary
from twotower.cli.demo import SAMPLES
from twotower.cli.main import main
from twotower.cli.replay import Frame, Scene, block_frames, token_frames
from twotower.lab.corpus import sample

SOURCE = Path(__file__).parents[2] / "src"
FLAGS = ["--prompt", "abc", "--max-new-tokens", "9", "--repeats", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("demo") / "model"))


def test_json_holds_both_modes(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json", "--model", checkpoint, *FLAGS]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert err == "" and record["prompt"] == "abc"
    assert set(record["modes"]) == {"ar", "diffusion", "speculative"}
    assert record["modes"]["speculative"]["tokens"] == record["modes"]["ar"]["tokens"]
    model, tokenizer = load_checkpoint(checkpoint), twotower.load_tokenizer(checkpoint)
    for mode, figures in record["modes"].items():
        options = twotower.GenerateOptions(mode=mode, max_new_tokens=9)
        (wanted,) = twotower.generate(model, ["abc"], options, tokenizer)
        assert figures["text"] == wanted.text and figures["nfe"] == wanted.nfe
        assert figures["context_forwards"] == wanted.context_forwards
        assert figures["tokens_per_nfe"] == (9 / wanted.nfe if wanted.nfe else None)
        assert figures["tokens_per_s"] * figures["seconds"] == pytest.approx(9)
    texts = {figures["text"] for figures in record["modes"].values()}
    assert record["same_text"] is (len(texts) == 1)


def test_the_modes_take_the_decoding_flags(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: a table of other options than were asked for."""
    flags = ["--temp", "0.8", "--seed", "5", "--block-size", "4", "--steps-per-block", "2"]
    flags += ["--drafts", "denoiser", "--repetition-penalty", "1.2"]
    assert main(["demo", "--json", "--model", checkpoint, *FLAGS, *flags]) == 0
    modes = json.loads(capsys.readouterr().out)["modes"]
    model, tokenizer = load_checkpoint(checkpoint), twotower.load_tokenizer(checkpoint)
    own = {"diffusion": {"block_size": 4, "steps_per_block": 2}, "ar": {"repetition_penalty": 1.2}}
    own["speculative"] = {"block_size": 4, "drafts": "denoiser", "repetition_penalty": 1.2}
    for mode, values in own.items():
        o = twotower.GenerateOptions(mode=mode, max_new_tokens=9, temperature=0.8, seed=5, **values)
        (wanted,) = twotower.generate(model, ["abc"], o, tokenizer)
        assert modes[mode]["text"] == wanted.text and modes[mode]["nfe"] == wanted.nfe


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--top-k", "5"], "--top-k 5: has no effect at temperature 0"),
        (["--remask", "random"], "unrecognized options: --remask"),
        (["--mode", "ar"], "unrecognized options: --mode"),
        (["--confidence-threshold", "2"], "--confidence-threshold 2.0 must be between 0 and 1"),
        (["--escape"], "--escape: no effect without --prompt or --stop"),
    ],
)
def test_flags_without_effect_are_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *flags]) == 2
    assert said in capsys.readouterr().err


def test_piped_it_is_plain_text(checkpoint: str) -> None:
    """Guards against escape sequences and live drawing in a log file."""
    done = subprocess.run(
        [sys.executable, "-m", "twotower.cli.main", "demo", "--model", checkpoint, *FLAGS],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "" and "\x1b" not in done.stdout
    assert done.stdout.startswith("Prompt\nabc\n")
    assert re.search(
        r"^diffusion +[\d,]+ +\d+ +\d+\.\d\d +\d+ +\d+\.\d\d +(same|differs)", done.stdout, re.M
    )
    assert re.search(r"^ar +[\d,]+ +0 +- +9 ", done.stdout, re.M)
    assert re.search(r"^speculative .* same", done.stdout, re.M)
    assert "Diffusion was " in done.stdout and "Self-speculation was " in done.stdout


def render(frame: Frame, width: int, colour: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    console.print(frame.picture)
    return file.getvalue()


def scene(colour: bool = False) -> Scene:
    return Scene(prompt="abc", tokenizer=tiny_tokenizer(), width=60, has_colour=colour)


def recorded(mode: twotower.engine.Mode) -> list[twotower.Event]:
    defaults: dict[str, object] = {"block_size": 16, "confidence_threshold": 0.3}
    options = options_of(defaults, {"mode": mode, "max_new_tokens": 22, "ignore_eos": True})
    with pytest.warns(UserWarning) if mode == "diffusion" else io.StringIO():
        return list(twotower.stream(tiny_model(), ["abc"], options, tiny_tokenizer()))


def masked_cells(picture: str) -> int:
    return len(re.findall(r"\.{6}", picture))


def test_the_cells_of_a_block_fill_in_place() -> None:
    """Guards against pictures of another step, and lines too long for a narrow terminal."""
    events = recorded("diffusion")
    pictures = [render(frame, 60) for frame in block_frames(scene(), events)]
    assert max(len(line) for picture in pictures for line in picture.splitlines()) <= 60
    steps = [event for event in events if isinstance(event, twotower.StepTaken)]
    shown = [masked_cells(p) for p in pictures if "step " in p]
    assert shown == [sum(step.is_masked) for step in steps]
    assert masked_cells(pictures[0]) == 16
    finished = events[-1]
    assert isinstance(finished, twotower.Finished)
    assert f"abc{finished.completion.text}" in "".join(pictures[-1].splitlines())
    assert f"22 tokens, NFE {finished.completion.nfe}" in pictures[-1]


def test_what_stands_of_a_draft_joins_the_text() -> None:
    """Guards against a picture that keeps the draft's wrong token beside AR's own."""
    step = dict(row=0, block_index=1, step=0, t=0.75, is_masked=[False] * 3, nfe=1)
    draft = twotower.StepTaken(tokens=[5, 6, 7], confidence=[0.9] * 3, **step)  # type: ignore[arg-type]
    commit = dict(row=0, block_index=1, text="xy", nfe=1, context_forwards=2)
    for tokens, cells in (([5, 9], 1), ([9], 0), ([5, 6, 7, 8], 3)):
        events = [draft, twotower.TokensCommitted(tokens=tokens, **commit)]  # type: ignore[arg-type]
        frames = list(block_frames(scene(colour=True), events, "speculative"))
        assert len(re.findall(r"30;46m|30;42m", render(frames[2], 60, colour=True))) == cells + 2


def test_confidence_has_colours_only_where_there_are_colours() -> None:
    events = recorded("diffusion")
    with_colour = [render(f, 60, colour=True) for f in block_frames(scene(colour=True), events)]
    assert any(re.search(r"\x1b\[[\d;]*4[1236]m", picture) for picture in with_colour)
    assert "confidence:" in with_colour[0]
    steps = [event for event in events if isinstance(event, twotower.StepTaken)]
    new = [len(re.findall(r"\x1b\[1;4;30;4\dm", p)) for p in with_colour if "step " in p]
    left = [16 - sum(step.is_masked) for step in steps]
    assert new == [n - (left[i - 1] if steps[i].step else 0) for i, n in enumerate(left)]
    without = [render(f, 60) for f in block_frames(scene(), events)]
    assert not any("\x1b" in picture for picture in without)


def test_ar_grows_by_a_token() -> None:
    pictures = [render(frame, 60) for frame in token_frames(scene(), recorded("ar"))]
    assert len(pictures) == 22
    assert "7 tokens, 7 context forwards" in pictures[6]


def measured(seconds: float, nfe: int, context_forwards: int, text: str) -> Measured:
    completion = Completion(
        tokens=[5] * 30,
        text=text,
        nfe=nfe,
        context_forwards=context_forwards,
        finish_reason="length",
    )
    return Measured(completion=completion, events=[], seconds=seconds)


def test_the_words_below_the_table_are_honest() -> None:
    """Guards against praise for a slower mode."""
    ar = measured(0.3, 0, 30, "x")
    slow, fast = measured(0.6, 10, 2, "x"), measured(0.1, 10, 2, "y")
    assert summary(ar, slow) == (
        "Diffusion was slower than AR, at 50% of its speed here: 12 passes of 50.0 ms, "
        "against 30 passes of 10.0 ms. The texts are the same."
    )
    assert summary(ar, fast).startswith("Diffusion was 3.0 times as fast as AR here: 12 passes")
    assert summary(ar, fast).endswith("The texts are different.")


@pytest.mark.parametrize("width", [40, 60, 100])
def test_the_table_fits(width: int) -> None:
    file = io.StringIO()
    results = {"ar": measured(0.3, 0, 30, "x"), "diffusion": measured(0.6, 110, 12, "x")}
    print_comparison(Console(file=file, width=width), results)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "\u2026" not in text
    words = set(text.split())
    assert {"diffusion", "50", "110", "0.27", "12", "0.60", "same", "tokens/NFE"} <= words


SEEDS = {"math": 3, "code": 1, "editing": 0, "tools": 2, "knowledge": 3}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_held_out(name: str) -> None:
    """Guards against a demo that shows what the model has learnt by heart."""
    assert sample(name, "test", Random(SEEDS[name])).prompt == SAMPLES[name]  # type: ignore[index]
