"""`twotower bench`: with and without baselines, its record, pictures and refusals."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("num2words")
pytest.importorskip("jsonschema")

from tiny_models import fresh_model, tiny_config
from tiny_text import tiny_tokenizer
from twotower.checkpoint import save_two_towers
from twotower.cli.main import main
from twotower.families import config_to_dict
from twotower.lab.bench import replay

FLAGS = ["--items", "1", "--max-new-tokens", "12", "--repeats", "3", "--replays", "2"]
FLAGS += ["--max-prompt-tokens", "1000"]
OURS = {"ar", "diffusion", "speculative"}
TINY = config_to_dict(tiny_config(hybrid_override_pattern="M*-", hidden_size=32, vocab_size=96))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "model"
    model = fresh_model(hybrid_override_pattern="M*-M*-", hidden_size=32)
    save_two_towers(model, folder, extra_files=tiny_tokenizer().files())
    return str(folder)


@pytest.fixture(autouse=True)
def tiny_random_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 32M of these tests is tiny: what is tested does not depend on its size."""
    monkeypatch.setitem(replay.SIZES, "32M", TINY)


def test_bench_without_baselines(
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silent failure: a missing baseline is left out, and our AR looks like the best there is."""
    for library in ("transformers", "xllamacpp", "gguf"):
        monkeypatch.setitem(sys.modules, library, None)
    out = tmp_path / "bench"
    flags = ["--model", checkpoint, "--sizes", "shipped,32M", "--output", str(out), *FLAGS]
    assert main(["bench", "--json", *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["sizes"]) == ["shipped", "32M"] and record["complete"] is True
    for found in record["sizes"].values():
        assert set(found["engines"]) == {"eager", "native", "native-int8"}
        assert set(found["engines"]["eager"]) == OURS
        for row in found["engines"]["eager"].values():
            assert row["ms_per_token"] > 0 and row["speedup_vs_best_ar"] > 0
            assert row["decode_ms_per_token"] > 0 and row["n"] == found["n"]
        assert found["best_ar"][1] == "ar"
        assert {"ar_step", "denoise_pass", "extend"} <= set(found["ms_by_engine"]["native"])
        assert [row["regime"].split("-")[1] for row in found["limits"]] == ["bound"] * 12
        missing = " ".join(found["missing"])
        assert "transformers" in missing and "llama.cpp-q8_0" in missing
        assert "pip install" in missing
    shipped, random = record["sizes"]["shipped"], record["sizes"]["32M"]
    assert {"correct", "accuracy"} <= set(shipped["engines"]["eager"]["diffusion"])
    for modes in shipped["engines"].values():  # lossless, within each engine
        assert modes["speculative"]["same_tokens_as_own_ar"] == shipped["n"]
    assert "correct" not in random["engines"]["eager"]["diffusion"] and random["n"] == 2
    # One long-context prompt at most is above 1000 tokens; whether this one is, the record says.
    is_short = any("left out" in line for line in record["warnings"])
    assert shipped["n"] == 8 - is_short
    assert json.loads((out / "bench.json").read_text()) == record
    assert {file.name for file in out.glob("*.png")} == {
        "speed.png",
        "break_even_shipped.png",
        "break_even_32M.png",
    }


def test_replays_repeat_what_the_checkpoint_commits(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: the random model decodes at its own pace, and its row means nothing."""
    flags = ["--model", checkpoint, "--sizes", "shipped,32M", "--no-baselines", *FLAGS]
    assert main(["bench", "--json", *flags, "--replays", "99"]) == 0
    found = json.loads(capsys.readouterr().out)["sizes"]
    shipped, random = (found[size]["engines"]["eager"] for size in ("shipped", "32M"))
    for mode in OURS:
        for field in ("tokens", "nfe", "context_forwards"):
            assert random[mode][field] == shipped[mode][field]
    assert found["32M"]["missing"] == []


def test_bench_with_baselines(checkpoint: str, capfd: pytest.CaptureFixture[str]) -> None:
    for library in ("transformers", "xllamacpp", "gguf"):
        pytest.importorskip(library)
    assert main(["bench", "--model", checkpoint, "--threads", "1", *FLAGS]) == 0
    text, err = capfd.readouterr()
    assert "falling back" not in err  # a baseline's notes about itself are no result
    for name in ("eager", "transformers", "llama.cpp-f32", "llama.cpp-f16", "llama.cpp-q8_0"):
        assert name in text
    assert "x best" in text and "overhead-bound" in text and "tokens/NFE" in text
    assert "not measured" not in text


def test_a_missing_baseline_is_printed(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("transformers", "xllamacpp", "gguf"):
        monkeypatch.setitem(sys.modules, library, None)
    assert main(["bench", "--model", checkpoint, *FLAGS]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "not measured: transformers" in text and "not measured: llama.cpp-f32" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--sizes", "9M"], "sizes: '9M' is unknown"),
        (["--modes", "diffusion"], "lacks ar"),
        (["--threads", "0"], "--threads 0 must be between 1 and 1024"),
        (["--max-prompt-tokens", "1"], "leaves out every prompt"),
        (["--output", "/dev/null/x"], "output: cannot write into /dev/null/x"),
        (["--model", "/nowhere"], "/nowhere"),
        (
            ["--backend", "eager", "--quantization", "int8,int4"],
            "--backend eager: eager passes run weights as they are loaded; use --backend eager wi",
        ),
        (["--quantization", "int8,int3"], "--quantization: 'int3' is unknown; use some of none,"),
        (["--expert-storage", "mmap"], "unrecognized options: --expert-storage"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
