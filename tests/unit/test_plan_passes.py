"""Bytes, operations and seconds of a pass, with values computed by hand."""

from dataclasses import replace

import pytest

from tiny_models import tiny_config
from tiny_plan import machine, setup
from tiny_qwen3_moe import tiny_config as qwen3_moe
from twotower.checkpoint.inspect import describe_config
from twotower.config import DraftSpec
from twotower.lab.plan.inputs import Efficiency, Widths, uniform
from twotower.lab.plan.passes import (
    ModelShape,
    Pass,
    PlanSetup,
    expected_experts,
    pass_parts,
    time_pass,
)
from twotower.model.thin import thin_config

STEP = Pass(tower="context", rows=1, tokens=1, logits=1, past=10)
BLOCK = Pass(tower="denoiser", rows=3, tokens=4, logits=4, past=10)


def test_expected_experts() -> None:
    assert expected_experts(128, 6, 1) == pytest.approx(6)
    assert expected_experts(128, 6, 0) == 0
    assert expected_experts(4, 2, 2) == 3  # of four, two each: the second token hits one of them
    assert expected_experts(4, 4, 1) == 4
    # The published model's block of 16, where 60 to 90 were counted.
    assert expected_experts(128, 6, 16) == pytest.approx(128 * (1 - (122 / 128) ** 16))
    assert round(expected_experts(128, 6, 16), 1) == 68.6


def test_the_parts_of_a_step() -> None:
    """Mamba, attention, experts, by hand at width 16: 4 experts of 2 x 16 x 12, shared 2 x 16 x 20.

    Silent failure: a step is charged all experts, and every pass looks as cheap as it.
    """
    parts = {p.name: p for p in pass_parts(setup().shape, STEP, uniform("bfloat16"))}
    mamba = 2 * (16 * 100 + 64 * 5 + 32 * 16 + 32 + 3 * 4)  # two layers, as test_race_limits counts
    attention = 2 * (16 * (32 + 16 + 16) + 32 * 16)
    sizes = {"mamba": mamba, "attention": attention, "mlp": 2 * 16 * 24, "moe shared": 2 * 16 * 20}
    sizes |= {"norms": 7 * 16, "head": 16 * 41}
    for name, count in sizes.items():
        assert parts[name].weight_bytes == 2 * count, name
        assert parts[name].operations == 2 * count, name
    assert parts["moe routed"].weight_bytes == 2 * 2 * 384  # one token's two experts
    assert parts["moe routed"].operations == 2 * 2 * 384
    router = 4 * 16 + 4  # weights and the correction of each expert, in float32
    assert parts["moe router"].weight_bytes == 4 * router
    # Keys of 11 tokens in two layers, 2 x 2 x 8 each; two states of 4 x 8 x 8 float32 and 64 x 3
    # conv inputs, read and written.
    assert parts["cache"].cache_bytes == 11 * 64 * 2 + 2 * 2 * (256 * 4 + 192 * 2)
    assert parts["cache"].operations == 2 * 4 * 32 * 11 + 5 * 512
    assert set(parts) == {*sizes, "moe routed", "moe router", "cache"}


def test_a_step_of_qwen3_30b_a3b() -> None:
    """Silent failure: a gate that no step reads, or a thin denoiser without experts that is charged
    some.

    By hand: 48 blocks of 128 experts of 3 x 2048 x 768, of which a token chooses 8.
    """
    config = qwen3_moe(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        vocab_size=151936, mlp_only_layers=[], eos_token_id=None,
    )  # fmt: skip
    thin = thin_config(config, (0, 46, 94), 4, DraftSpec(vocab_size=None))
    shape = ModelShape.of(describe_config(thin, "30B-A3B"))
    parts = {p.name: p.weight_bytes for p in pass_parts(shape, STEP, uniform("bfloat16"))}
    assert parts["moe routed"] == pytest.approx(2 * 48 * 8 * 3 * 2048 * 768)
    assert parts["moe router"] == 4 * 48 * 128 * 2048 and "moe shared" not in parts
    assert parts["attention"] == 2 * 48 * (2048 * 128 * (32 + 4 + 4 + 32) + 2 * 128)
    drafts = {p.name: p.weight_bytes for p in pass_parts(shape, BLOCK, uniform("bfloat16"))}
    assert drafts["attention"] == parts["attention"] / 16
    assert not [name for name in drafts if name.startswith("moe")]
    made = replace(setup(), shape=shape)
    assert time_pass(made, STEP).num_experts == pytest.approx(8)
    assert time_pass(made, BLOCK).num_experts == 0


def test_the_parts_of_a_denoiser_pass() -> None:
    """Three rows of four tokens: weights once, arithmetic and cache by row, states only read."""
    parts = {p.name: p for p in pass_parts(setup().shape, BLOCK, uniform("bfloat16"))}
    touched = 4 * (1 - 0.5**12)
    assert parts["moe routed"].weight_bytes == pytest.approx(2 * 384 * touched)
    assert parts["moe routed"].operations == 12 * 2 * 2 * 384
    assert parts["head"].weight_bytes == 2 * 656 and parts["head"].operations == 12 * 2 * 656
    assert parts["cache"].cache_bytes == 3 * (14 * 64 * 2 + 2 * (256 * 4 + 192 * 2))
    assert parts["cache"].operations == 12 * (2 * 4 * 32 * 14 + 5 * 512)
    # Time is a matter of rows, not of tokens.
    conditioning = setup().shape.parameters["denoiser"]["time conditioning"]
    assert parts["time conditioning"].operations == 3 * 2 * conditioning
    extend = Pass(tower="context", rows=3, tokens=4, logits=0, past=10)
    names = {p.name for p in pass_parts(setup().shape, extend, uniform("bfloat16"))}
    assert "head" not in names and "time conditioning" not in names


def test_causal_passes_see_half_of_their_own_call() -> None:
    read = Pass(tower="context", rows=1, tokens=9, logits=0, past=0)
    found = next(p for p in pass_parts(setup().shape, read, uniform("bfloat16")) if p.cache_bytes)
    assert found.operations == 9 * (2 * 4 * 32 * 5 + 5 * 512)


def test_seconds_of_a_pass() -> None:
    """By bytes and by operations part by part; one Gop/s and one GB/s make them comparable."""
    made = setup(hybrid_override_pattern="*")
    # 12 tokens: each weight is 2 bytes and 24 operations, so all matrices are ruled by arithmetic.
    found = time_pass(made, BLOCK)
    parts = pass_parts(made.shape, BLOCK, made.widths)
    assert found.seconds == pytest.approx(sum(p.operations for p in parts) / 1e9)
    assert (found.stream_s, found.host_s, found.ruled_by) == (0.0, 0.0, "arithmetic")
    # One token and a hundred times the arithmetic: all is streaming.
    fast = setup(machine(tflops={"bfloat16": 0.1}), hybrid_override_pattern="*")
    found = time_pass(fast, STEP)
    parts = pass_parts(made.shape, STEP, made.widths)
    assert found.seconds == pytest.approx(sum(p.weight_bytes + p.cache_bytes for p in parts) / 1e9)
    assert (found.compute_s, found.ruled_by) == (0.0, "bandwidth")


def test_efficiency_slows_each_limit_down() -> None:
    half = Efficiency(bandwidth=0.5, arithmetic=0.25, layer_s=1e-3)
    fast, slow = machine(tflops={"bfloat16": 0.1}), machine(bandwidth_gb_s=1000)
    for hardware, factor in ((fast, 2), (slow, 4)):
        ideal = time_pass(setup(hardware), STEP).seconds
        real = time_pass(setup(hardware, half), STEP)
        assert real.seconds == pytest.approx(factor * ideal + 6 * 1e-3)  # six layers
        assert real.overhead_s == pytest.approx(6e-3) and real.ruled_by == "overhead"


def test_experts_behind_a_slow_link() -> None:
    made = setup(machine(tflops={"bfloat16": 1.0}, host_gib=1, host_gb_s=0.1))
    near, far = time_pass(made, STEP), time_pass(made, STEP, host_share=0.5)
    moved = 0.5 * 2 * 2 * 384  # half of two experts
    assert far.host_s == pytest.approx(moved / 1e8)
    assert far.seconds - near.seconds == pytest.approx(moved / 1e8 - moved / 1e9)


def test_further_rows_take_a_share_of_a_layer_again() -> None:
    """Silent failure: an engine's work on each row is left out, and a batch gains too much."""
    shared = Efficiency(bandwidth=1.0, arithmetic=1.0, layer_s=1e-3)
    made = setup(machine(tflops={"bfloat16": 0.1}), shared)
    again = replace(made, efficiency=replace(shared, row_share=0.25))
    assert time_pass(again, STEP) == time_pass(made, STEP)
    for rows in (2, 5):
        call = replace(STEP, rows=rows)
        more = time_pass(again, call).seconds - time_pass(made, call).seconds
        assert more == pytest.approx(6 * 1e-3 * 0.25 * (rows - 1))  # six layers
    with pytest.raises(ValueError, match="row_share=2 must be between 0 and 1"):
        replace(shared, row_share=2)


def test_int8_arithmetic_needs_a_rate() -> None:
    with pytest.raises(ValueError, match="compute: round has no rate for 'int8'; allowed are bf"):
        replace(setup(), compute="int8")


def test_a_model_without_experts_counts_none() -> None:
    dense: PlanSetup = setup(hybrid_override_pattern="M*-")
    assert time_pass(dense, STEP).num_experts == 0
    wide = Widths(experts="int4", projections="bfloat16", head="bfloat16", dtype="bfloat16")
    assert time_pass(replace(dense, widths=wide), STEP) == time_pass(dense, STEP)


def test_a_backbone_alone_is_planned_with_a_copy_of_it() -> None:
    """Silent failure: a checkpoint without a denoiser has one that weighs nothing."""
    record = describe_config(tiny_config(), "tiny")
    alone = replace(record, towers={"context": record.towers["context"]})
    shape = ModelShape.of(alone)
    assert shape.parameters["denoiser"] == shape.parameters["context"]
    both = ModelShape.of(record).parameters
    assert sum(both["denoiser"].values()) > sum(both["context"].values())  # time conditioning
