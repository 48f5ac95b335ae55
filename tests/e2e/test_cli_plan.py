"""`twotower plan` as a user runs it: text, JSON, report, and one line for every error."""

import json
from pathlib import Path

import pytest

from tiny_models import tiny_config
from twotower.cli.main import main
from twotower.families import config_to_dict
from twotower.lab.plan.report import MODE_COLUMNS, PASS_COLUMNS


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_to_dict(tiny_config())))
    return str(file)


def test_text(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", config, "--hardware", "h100-sxm", "--tokens-per-nfe", "2"]
    assert main(["plan", *flags, "--max-batch-size", "4", "--devices", "2"]) == 0
    out = capsys.readouterr().out
    for said in (
        "Weights: context",
        "Usable memory: 2 x 73.6 GiB.",
        "diffusion: ",
        "dollars a million tokens, on",
        "A denoiser pass takes",
        "Diffusion is as fast as AR from",
        "speculative fits (one device); tokens per cycle are not known",
        "Faster, by batch size",
        "bound by",
        "Predicted, not measured",
    ):
        assert said in " ".join(out.split()), said


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_narrow_terminal_loses_nothing(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: columns of the tables that a narrow window cuts off."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["plan", "--max-batch-size", "1"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width and "\u2026" not in text
    words = " ".join(text.split())
    for name in (*MODE_COLUMNS, *PASS_COLUMNS, "one device, 43% of the experts in host memory"):
        assert all(word in words for word in name.split()), name
    assert main(["plan", "--list-hardware"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width and "\u2026" not in text
    for word in ("fpsbench.com", "rtx-4090", "989", "source"):
        assert word in text


def test_text_of_a_machine_where_ar_stays_faster(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--hardware", "rtx-4090", "--quantization", "int4", "--max-batch-size", "1"]
    assert main(["plan", *flags]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Usable memory: 1 x 22.1 GiB." in out
    assert "Diffusion is never as fast as AR; speculation is never as fast as AR." in out


def test_json(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", config, "--json", "--tokens-per-cycle", "3",
                 "--price-per-hour", "2", "--max-batch-size", "2"]) == 0  # fmt: skip
    record = json.loads(capsys.readouterr().out)
    assert record["model"]["name"] == config and record["price_per_hour"] == 2
    assert record["workload"]["tokens_per_cycle"] == 3
    assert all(found["tokens_per_s"] > 0 for found in record["modes"].values())
    assert len(record["hardware"]["source"]) > 8


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Silent failure: a page that needs other files, or a name that becomes markup."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "<b>model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_dict(tiny_config())))
    out = tmp_path / "plan"
    assert (
        main(["plan", "--model", str(folder), "--output", str(out), "--max-batch-size", "4"]) == 0
    )
    capsys.readouterr()
    names = ["break_even.png", "memory.png", "passes.png", "plan.json", "report.html", "speed.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "&lt;b&gt;model on 1 x h100-sxm" in page and "<b>model" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "What is assumed" in page and "independent tokens, even experts" in page
    assert json.loads((out / "plan.json").read_text())["devices"] == 1


def test_report_of_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only memory can be drawn."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "plan"
    assert main(["plan", "--hardware", "bench-1-thread", "--output", str(out)]) == 0
    assert "ar does not fit: context needs" in " ".join(capsys.readouterr().out.split())
    assert sorted(path.name for path in out.iterdir()) == ["memory.png", "plan.json", "report.html"]


def test_the_list_of_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[mine]\nkind="cpu"\nmemory_gib=1\nbandwidth_gb_s=1\n'
                    'tflops={float32=1}\nsource="mine"\n')  # fmt: skip
    assert main(["plan", "--list-hardware", "--hardware-file", str(file), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["mine"]["source"] == "mine" and listed["l4"]["memory_gib"] == 24
    assert main(["plan", "--list-hardware"]) == 0
    out = capsys.readouterr().out
    assert "rtx-4090" in out and "data sheet" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hardware", "h100"], "hardware: 'h100' is unknown, perhaps h100-sxm; known are"),
        (["--hardware-file", "gone.toml"], "--hardware-file: cannot read gone.toml (No such file"),
        (["--model", "nano30b"], "model: 'nano30b' is not a file or folder, perhaps nano-30b"),
        (["--devices", "4"], "devices 4 must be 1, or 2"),
        (["--hardware", "power8", "--devices", "2"], "devices: power8 has no link_gb_s"),
        (["--quantization", "int3"], "quantization"),
        (["--head-weights", "int4"], "--head-weights: int4 breaks the choice of tokens"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (
            ["--tokens-per-nfe", "17"],
            "--tokens-per-nfe 17.0 must be above 0 and at most",
        ),
        (["--compute", "int8", "--hardware", "m3-ultra"], "compute: m3-ultra has no rate for 'int"),
        (["--results", "gone.json"], "results: cannot read gone.json (No such file"),
        (["--bandwidth-share", "2"], "--bandwidth-share 2.0 must be above 0"),
    ],
)
def test_errors_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ") and message in captured.err
