"""Describing and converting: figures of the published model, headers only, and the two commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from twotower.checkpoint import convert, convert_to_gguf, describe, load_checkpoint
from twotower.cli.convert import ConvertOptions
from twotower.cli.convert import run as run_convert
from twotower.cli.inspect import InspectOptions
from twotower.cli.inspect import run as run_inspect

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_30b_figures_are_the_published_ones() -> None:
    """31.6B a tower, 3.6B active, 63.2B in all, 94.5 % in experts, 118 GB (2^30) in BF16."""
    record = describe("nano-30b")
    assert [round(tower.total / 1e9, 1) for tower in record.towers.values()] == [31.6, 31.6]
    assert [round(tower.active / 1e9, 1) for tower in record.towers.values()] == [3.6, 3.6]
    assert round(record.total / 1e9, 1) == 63.2
    assert round(100 * record.expert_share, 1) == 94.5
    assert round(record.weight_bytes["bfloat16"] / 2**30) == 118
    assert record.layers == {"Mamba-2": 23, "attention": 6, "mixture of experts": 23}
    assert record.kv_bytes_per_token == {"float32": 12288, "bfloat16": 6 * 2 * 2 * 128 * 2}
    ssm, conv = 23 * 64 * 64 * 128 * 4, 23 * 6144 * 3
    assert record.state_bytes_per_row == {"float32": ssm + 4 * conv, "bfloat16": ssm + 2 * conv}


@pytest.mark.parametrize("case", ["case_01", "case_02", "case_03"])
def test_counts_agree_with_the_files(case: str) -> None:
    record = describe(GOLDEN / case)
    assert record.files is not None and record.files.problem is None
    assert record.total == sum(record.files.elements_by_dtype.values())
    assert record.total == sum(
        t.numel() for t in load_checkpoint(GOLDEN / case).state_dict().values()
    )
    for tower in record.towers.values():
        assert tower.total == sum(tower.parameters.values())
    assert record.files.files == (3 if case == "case_02" else 1)


def test_active_parameters_count_the_chosen_experts() -> None:
    tower = describe(GOLDEN / "case_01").towers["context"]
    assert tower.parameters["moe routed"] == 3 * 8 * 2 * 32 * 64
    assert tower.total - tower.active == 3 * (8 - 2) * 2 * 32 * 64


def test_weights_are_not_read(tmp_path: Path) -> None:
    """Guards against reading 118 GB to print a table: here the values are not even on disk."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / "case_01" / name, tmp_path / name)
    whole = describe(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)  # a hole: zeros that take no space
    assert describe(tmp_path) == whole


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    shutil.copyfile(GOLDEN / "case_01/config.json", tmp_path / "config.json")
    for path in (tmp_path, tmp_path / "config.json"):
        record = describe(path)
        assert record.files is None and record.total == describe(GOLDEN / "case_01").total


def test_files_that_do_not_fit_are_described_with_their_problem(tmp_path: Path) -> None:
    shutil.copyfile(GOLDEN / "case_03/model.safetensors", tmp_path / "model.safetensors")
    values = json.loads((GOLDEN / "case_03/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": 256}))
    files = describe(tmp_path).files
    assert files is not None and files.problem is not None
    assert "4 misshapen: context_tower.embeddings.weight [128, 64]" in files.problem


def test_inspect_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_inspect(InspectOptions(path="nano-30b")) == 0
    text = capsys.readouterr().out
    assert "63.2B in all" in text and "117.7 GiB" in text and "29,374,808,064" in text
    assert run_inspect(InspectOptions(path=str(GOLDEN / "case_03"), json=True)) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["config"]["hybrid_override_pattern"] == "EM*-M"
    assert values["files"]["elements_by_dtype"] == {"BF16": 312672, "F32": 16}


def test_inspect_tells_a_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards a user whose long prompt is forgotten: nothing else says that layers see 8 tokens."""
    values = {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 50,
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    run_inspect(InspectOptions(path=str(tmp_path)))
    assert "8 tokens in 3 of 4 attention layers" in capsys.readouterr().out


def test_inspect_wants_exactly_one_source() -> None:
    for arguments in ({}, {"path": "a", "model": "nano-30b"}):
        with pytest.raises(ValueError, match="inspect needs one model"):
            InspectOptions(**arguments)  # type: ignore[arg-type]  # on purpose
    named = "model: nano-300b is not a file or folder; give nano-30b, a checkpoint .*, or shipped"
    with pytest.raises(ValueError, match=named):
        run_inspect(InspectOptions(model="nano-300b"))


def test_convert_takes_the_other_files_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a converted model without its tokenizer."""
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "case_02", source)
    (source / "tokenizer.json").write_text("{}")
    for to in ("backbone", "released", "transformers"):
        options = ConvertOptions(
            source=str(source), target=str(tmp_path / to), to=to, dtype="bfloat16"
        )  # type: ignore[arg-type]  # a Literal from a loop
        assert run_convert(options) == 0
        assert (tmp_path / to / "tokenizer.json").read_text() == "{}"
        assert not (tmp_path / to / "model.safetensors.index.json").exists()
        model = load_checkpoint(tmp_path / to, dtype=None, towers="context")
        assert model.context_lm_head.weight.dtype == torch.bfloat16
    assert capsys.readouterr().out.count("written in the") == 3
    with pytest.raises(ValueError, match="is the source itself"):
        convert(source, source, "released")
    with pytest.raises(ValueError, match="is the source itself"):
        convert_to_gguf(source, source)
