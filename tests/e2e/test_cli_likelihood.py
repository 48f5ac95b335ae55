"""`twotower evaluate --likelihood`: the record, the table, the report, the context tower alone."""

import json
from pathlib import Path

import pytest

pytest.importorskip("num2words")
pytest.importorskip("matplotlib")

from tiny_checkpoint import make_checkpoint
from twotower.cli.main import main

FLAGS = ["--items", "2", "--max-new-tokens", "4", "--categories", "math,refusal"]


def test_likelihoods_of_the_reference_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(make_checkpoint(tmp_path / "model"))
    flags = ["--likelihood", "--model", checkpoint, *FLAGS]
    assert main(["evaluate", "--output", str(tmp_path), *flags]) == 0
    assert "bound nats/token" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["likelihood"]
    assert list(found["categories"]) == ["math", "refusal"] and found["all"]["n"] == 4
    assert found["all"]["ar_nats_per_token"] > 0 and found["all"]["bound_standard_error"] > 0
    assert f"{found['all']['bound_nats_per_token']:.4f}" in (tmp_path / "report.html").read_text()
    assert main(["evaluate", "--json", "--modes", "ar", *flags]) == 0
    alone = json.loads(capsys.readouterr().out)["likelihood"]
    assert alone["all"]["ar_nats_per_token"] == pytest.approx(found["all"]["ar_nats_per_token"])
    assert alone["all"]["bound_nats_per_token"] is None
