"""Quantised checkpoints as a user meets them: convert, inspect, generate, evaluate."""

import builtins
import json
from pathlib import Path

import pytest

from tiny_quantised import groupable_model
from tiny_text import tiny_tokenizer
from twotower.checkpoint import save_two_towers
from twotower.cli.main import main
from twotower.engine.resolved import MODES

WEIGHTS = {
    "int8": ["--quantization", "int8"],
    "int8-int8": ["--quantization", "int8", "--activations", "int8"],
    "int4": ["--quantization", "int4", "--group-size", "64"],
}
SHORT = ["--max-new-tokens", "6", "--ignore-eos", "--json"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "full"
    save_two_towers(groupable_model(), folder, extra_files=tiny_tokenizer().files())
    return folder


@pytest.fixture(scope="module")
def quantised(full: Path) -> dict[str, str]:
    folders = {name: str(full.parent / name) for name in WEIGHTS}
    for name, flags in WEIGHTS.items():
        assert main(["convert", str(full), folders[name], *flags]) == 0
    return folders


def text(model: str, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert main(["generate", "abcab", "--model", model, *SHORT, *flags]) == 0
    return str(json.loads(capsys.readouterr().out)["results"][0]["text"])


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_mode_runs_and_speculation_is_lossless(
    quantised: dict[str, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a mode that needs a full head, and drafts verified by other weights than AR's."""
    found = {mode: text(quantised[name], capsys, "--mode", mode) for mode in MODES}
    assert all(found.values())
    assert found["speculative"] == found["ar"]
    mapped = text(quantised[name], capsys, "--mode", "diffusion", "--expert-storage", "mmap")
    assert mapped == found["diffusion"]


def test_inspect_and_evaluate_take_them(
    quantised: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("num2words")
    capsys.readouterr()
    assert main(["inspect", quantised["int4"]]) == 0
    assert "int4 weights, groups of 64: " in capsys.readouterr().out
    flags = ["--items", "1", "--max-new-tokens", "8", "--categories", "math", "--json"]
    assert main(["evaluate", "--model", quantised["int4"], *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["complete"] and record["modes"]["diffusion"]["nfe"] > 0
    assert record["model"]["parameters"] == sum(p.numel() for p in groupable_model().parameters())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--quantization", "int4", "--group-size", "48"], "--group-size 48 must be 32, 64 or 128"),
        (["--group-size", "32"], "--group-size: no effect without --quantization int4"),
        (["--quantization", "int8", "--to", "transformers"], "needs --to released or backbone"),
    ],
)
def test_bad_flags_are_one_line(
    full: Path, tmp_path: Path, flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(full), str(tmp_path / "out"), *flags]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_scheme_is_one_line(
    quantised: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((Path(quantised["int8"]) / "config.json").read_text())
    config["quantization_config"]["weights"] = "int4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").hardlink_to(Path(quantised["int8"]) / "model.safetensors")
    assert main(["generate", "abc", "--model", str(tmp_path), *SHORT]) == 2
    err = capsys.readouterr().err
    assert "do not fit config.json" in err and err.count("\n") == 1


def test_without_torchao_only_quantising_fails(
    full: Path,
    quantised: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards the base install: it runs quantised checkpoints, and says what making one needs."""
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "torchao":
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["convert", str(full), str(tmp_path / "out"), "--quantization", "int8"]) == 2
    assert 'pip install ".[quant]"' in capsys.readouterr().err
    assert text(quantised["int4"], capsys, "--mode", "diffusion")
