"""What the options name: models, machines, widths, efficiency, recorded tokens per pass."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_config
from twotower.families import config_to_dict
from twotower.lab.plan import PlanOptions, make_plan
from twotower.lab.plan.inputs import PROFILES, Widths, Workload
from twotower.lab.plan.options import (
    PUBLISHED_TOKENS_PER_NFE,
    describe_model,
    make_setup,
    make_workload,
    read_recorded,
)
from twotower.lab.plan.passes import ModelShape, PlanSetup

MINE = """
[l4]
kind = "gpu"
memory_gib = 1
bandwidth_gb_s = 10
tflops = { float32 = 1 }
source = "smaller than the real one"
"""


def shape(**changes: object) -> ModelShape:
    from twotower.checkpoint.inspect import describe_config

    return ModelShape.of(describe_config(tiny_config(**changes), "tiny"))


def made(**options: Any) -> PlanSetup:
    return make_setup(PlanOptions(**options), shape())


def test_models_by_name_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert round(describe_model("nano-30b").total / 1e9, 1) == 63.2
    assert describe_model("shipped").source == "shipped"
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_to_dict(tiny_config())))
    assert describe_model(str(file)).config == tiny_config()
    assert describe_model(str(tmp_path)).config == tiny_config()
    with pytest.raises(
        ValueError, match="model: 'nano-30' is not a file or folder, perhaps nano-30b;"
    ):
        describe_model("nano-30")
    # A hub id would be downloaded by others: a plan reads no weights and no network.
    with pytest.raises(ValueError, match="'owner/name' is not a file or folder; known by name are"):
        describe_model("owner/name")


def test_a_file_of_machines_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE)
    found = made(hardware="l4", hardware_file=file)
    assert found.hardware.memory_gib == 1
    assert found.compute == "float32"  # it has no bfloat16
    assert made(hardware="l4").hardware.memory_gib == 24
    assert made(hardware="l40s", hardware_file=file).hardware.memory_gib == 48
    with pytest.raises(ValueError, match="devices: l4 has no link_gb_s, so two cannot be joined"):
        made(hardware="l4", hardware_file=file, devices=2)


def test_widths_by_part() -> None:
    assert made(quantization="int4", projection_weights="bfloat16").widths == Widths(
        experts="int4", projections="bfloat16", head="int8", dtype="bfloat16"
    )
    wide = made(dtype="float32")
    assert (wide.widths.dtype, wide.compute) == ("float32", "float32")
    assert made(dtype="float32", compute="bfloat16").compute == "bfloat16"
    found = made(expert_weights="int8", dtype="float32", kv_cache_dtype="float16").widths
    assert (found.cache_bytes, found.kv_bytes) == (4, 2)
    assert made(dtype="float32").widths.kv_bytes == 4


def test_efficiency_by_kind_and_by_number() -> None:
    for hardware, profile in (
        ("l4", "eager-gpu"),
        ("m4-max", "eager-gpu"),
        ("power8", "eager-cpu"),
    ):
        assert made(hardware=hardware).efficiency == PROFILES[profile]
    found = made(efficiency="graph-gpu", bandwidth_share=0.5, arithmetic_share=0.25, layer_us=7.0)
    assert (found.efficiency.bandwidth, found.efficiency.arithmetic) == (0.5, 0.25)
    assert found.efficiency.layer_s == pytest.approx(7e-6)
    with pytest.raises(ValueError, match=r"bandwidth_share=1\.5 must be above 0"):
        made(bandwidth_share=1.5)


def work(**options: Any) -> Workload:
    return make_workload(PlanOptions(**options), 16)


def test_tokens_per_pass_come_from_where_they_are_said(tmp_path: Path) -> None:
    """Silent failure: a recorded evaluation that is read and then not used."""
    file = tmp_path / "results.json"
    modes = {"diffusion": {"tokens_per_nfe": 6.5}, "speculative": {"tokens_per_forward": 9.5}}
    file.write_text(json.dumps({"modes": modes}))
    assert work().tokens_per_nfe == PUBLISHED_TOKENS_PER_NFE == pytest.approx(3.88, abs=0.002)
    assert work().tokens_per_cycle is None
    assert work(block_size=2).tokens_per_nfe == 2  # no more than a block
    found = work(results=file)
    assert (found.tokens_per_nfe, found.tokens_per_cycle) == (6.5, 9.5)
    found = work(results=file, tokens_per_nfe=2.0)
    assert (found.tokens_per_nfe, found.tokens_per_cycle) == (2.0, 9.5)
    file.write_text(json.dumps({"modes": {"diffusion": {"tokens_per_nfe": 6.5}}}))
    assert read_recorded(file) == {"tokens_per_nfe": 6.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a results.json"),
        ("[]", "is not a results.json"),
        ('{"modes": 3}', "is not a results.json"),
        ('{"modes": {"diffusion": 3}}', "is not a results.json"),
        ('{"modes": {"ar": {}}}', "has no block mode; evaluate diffusion or speculative"),
    ],
)
def test_results_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError) as refusal:
        read_recorded(file)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"results: cannot read .* \(No such file"):
        read_recorded(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 3}, "devices=3 must be 1, or 2 with a tower each"),
        ({"max_batch_size": 0}, "max_batch_size=0 must be between 1 and 65536"),
        ({"price_per_hour": -1.0}, "price_per_hour=-1.0 must be a finite number, at least 0"),
        (
            {"price_per_hour": float("nan")},
            "price_per_hour=nan must be a finite number",
        ),
        ({"efficiency": "eager"}, "efficiency: 'eager' is unknown, perhaps eager-gpu; allowed are"),
        (
            {"results": Path("r.json"), "tokens_per_nfe": 2.0, "tokens_per_cycle": 2.0},
            "results: has no effect beside tokens_per_nfe and tokens_per_cycle",
        ),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        PlanOptions(**options)
    assert message in str(refusal.value)


def test_a_record_is_plain_and_adds_up() -> None:
    """Silent failure: a cost per token of one device where two are paid for."""
    record = make_plan(PlanOptions(devices=2, batch_size=2, tokens_per_cycle=8.0, max_batch_size=8))
    assert json.loads(json.dumps(record)) == record
    for mode, used in (("ar", 1), ("diffusion", 2), ("speculative", 2)):
        found = record["modes"][mode]
        assert found["devices_used"] == used
        cost = used * record["price_per_hour"] / 3600 / found["tokens_per_s"] * 1e6
        assert found["dollars_per_million_tokens"] == pytest.approx(cost)
        tokens = 2 * 256 / (found["prefill_ms"] + found["decode_ms"]) * 1e3
        assert found["tokens_per_s"] == pytest.approx(tokens)
        assert found["tokens_per_s_all_devices"] == pytest.approx(tokens * (2 if used == 1 else 1))
        assert found["tokens_per_s_of_a_row"] == pytest.approx(tokens / 2)
    blocks = record["modes"]["diffusion"]
    ways = [blocks["decode_ms_in_sequence"], blocks["decode_ms_overlapped"]]
    assert blocks["decode_ms"] == min(ways) and blocks["overlapped"] is (ways[1] < ways[0])
    assert record["modes"]["ar"]["decode_ms_overlapped"] is None
    for call in record["passes"].values():
        parts = sum(call[name] for name in ("overhead_ms", "stream_ms", "compute_ms", "host_ms"))
        assert call["ms"] == pytest.approx(parts)
    assert [point["batch_size"] for point in record["sweep"]] == [1, 2, 4, 8]
    assert record["sweep"][1]["modes"]["ar"]["tokens_per_s"] == pytest.approx(
        record["modes"]["ar"]["tokens_per_s"]
    )
    assert record["workload"]["source"] == "published"


def test_what_does_not_fit_says_what_is_missing() -> None:
    record = make_plan(PlanOptions(hardware="m4-max", max_batch_size=4))
    ar, blocks = record["modes"]["ar"], record["modes"]["diffusion"]
    assert ar["fits"] and not blocks["fits"] and record["break_even"] is None
    assert blocks["missing"] == "context and denoiser need 117.8 GiB of a device that offers 96.0"
    assert {"ar_step", "extend", "verify"} >= set(record["passes"])
    assert record["modes"]["speculative"]["fits"] is False
    nothing = make_plan(PlanOptions(hardware="bench-1-thread", dtype="float32", max_batch_size=4))
    assert nothing["sweep"] == [] and nothing["spans"] == {"all": [], "per_device": []}
    assert nothing["passes"] == {} and not nothing["modes"]["ar"]["fits"]
    # In the host: a device that takes no experts at all, and a host that is too small for them.
    host = make_plan(PlanOptions(hardware="l4", dtype="float32", max_batch_size=1))
    assert "GiB of host memory that offers 57.6" in host["modes"]["ar"]["missing"]


def test_one_new_token_has_no_break_even() -> None:
    record = make_plan(PlanOptions(model="shipped", hardware="l4", new_tokens=1, max_batch_size=1))
    assert record["break_even"] is None
    assert record["modes"]["ar"]["decode_tokens_per_s"] is None
    assert record["modes"]["ar"]["tokens_per_s"] > 0


@pytest.mark.parametrize(("weights", "given", "wanted"), [
    ("int4", {}, "int4"), ("int8", {}, "int8"), (None, {}, "bfloat16"),
    ("int4", {"quantization": "none"}, "bfloat16"), (None, {"dtype": "float32"}, "float32"),
])  # fmt: skip
@pytest.mark.parametrize("is_folder", [True, False])
def test_a_quantised_checkpoint_is_planned_in_its_own_bits(
    tmp_path: Path, weights: str | None, given: Any, wanted: str, is_folder: bool
) -> None:
    """Silent failure: a plan for the weights that a checkpoint would have in bfloat16."""
    config = config_to_dict(tiny_config())
    if weights is not None:
        config["quantization_config"] = {"quant_method": "twotower", "weights": weights}
        config["quantization_config"] |= {"group_size": 32} if weights == "int4" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = tmp_path if is_folder else tmp_path / "config.json"
    setup = make_setup(PlanOptions(model=str(model), **given), shape())
    assert setup.widths.projections == wanted
    assert setup.widths.head == ("int8" if wanted == "int4" else wanted)
