"""What fits where: sizes against what is known exactly, and the edges of fitting."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models import tiny_config
from tiny_plan import machine, setup, workload
from twotower.checkpoint.inspect import describe, describe_config
from twotower.config import DraftSpec
from twotower.lab.plan.inputs import PROFILES, uniform
from twotower.lab.plan.memory import (
    activation_bytes,
    cache_bytes,
    device_maps,
    tower_bytes,
)
from twotower.lab.plan.passes import ModelShape, PlanSetup
from twotower.model.thin import thin_config

ROOT = Path(__file__).parents[2]
GIB = 2**30


def test_weights_are_those_that_inspect_counts() -> None:
    """118 GB, as published: 58.8 and 58.9 GiB in bfloat16."""
    record = describe("nano-30b")
    shape = ModelShape.of(record)
    total = sum(sum(tower_bytes(shape, t, uniform("bfloat16"))) for t in shape.parameters)
    # inspect counts a router's correction as a vector of its dtype, as we do: float32.
    assert total == pytest.approx(record.weight_bytes["bfloat16"], rel=1e-6)
    assert round(total / GIB) == 118
    dense, experts = tower_bytes(shape, "context", uniform("int4"))
    assert experts == 29374808064 * 5 / 8
    assert dense < 0.12 * experts


def test_cache_is_what_was_measured() -> None:
    """benchmarks/decode_memory.py counted the bytes of real caches, in float32."""
    record = json.loads((ROOT / "benchmarks/results/decode_memory_cpu_2026-11-26.json").read_text())
    shape = ModelShape.of(describe(ROOT / "src" / "twotower" / "assets"))
    for case in record["cases"]:
        length = case["prompt_tokens"] + record["settings"]["new_tokens"]
        counted = case["kv_bytes"] + case["state_bytes"]
        assert cache_bytes(shape, 1, length, uniform("float32")) == counted
        weights = sum(sum(tower_bytes(shape, t, uniform("float32"))) for t in shape.parameters)
        assert weights == case["weights_bytes"]


def test_a_block_moves_its_keys_and_the_states() -> None:
    """The whole cache grows with the text; what crosses the link for a block does not."""
    made = setup()
    assert cache_bytes(made.shape, 3, 4, made.widths) == 3 * (4 * 64 * 2 + 2 * (256 * 4 + 192 * 2))
    wide = replace(made.widths, kv_dtype="float32")
    assert cache_bytes(made.shape, 3, 4, wide) == 3 * (4 * 64 * 4 + 2 * (256 * 4 + 192 * 2))


def test_activations_go_with_what_a_pass_reads() -> None:
    made, work = setup(), workload(batch_size=2)
    width = 4 * 16 + 2 * 32 + 2 * 2 * 8 + 4  # four hidden states, the projection of a Mamba layer
    logits = 2 * 41 * 4  # of one token a row
    assert activation_bytes(made, work, "context", "ar") == 16 * width * 2 + logits
    assert activation_bytes(made, work, "context", "speculative") == 16 * width * 2 + 4 * logits
    assert activation_bytes(made, work, "denoiser", "diffusion") == 8 * width * 2 + 4 * logits
    long = replace(work, prompt_tokens=10**6)  # read in chunks of 512, sixteen rows at a time
    assert activation_bytes(made, long, "context", "ar") == 2 * 512 * width * 2 + logits
    many = replace(long, batch_size=40)
    assert activation_bytes(made, many, "context", "ar") == 16 * 512 * width * 2 + 20 * logits


def needed(mode: str = "ar", devices: int = 1) -> float:
    (*_, device_map) = device_maps(setup(), workload(), mode, devices)  # type: ignore[arg-type]  # one of the modes
    return max(device.total for device in device_map.devices)


def on(num_bytes: float, **changes: object) -> PlanSetup:
    return setup(machine(memory_gib=num_bytes / GIB, **changes))


def test_it_fits_to_the_byte() -> None:
    """Silent failure: a plan a few bytes too large for the device passes, or the reverse."""
    size = needed()
    for offered, fits in ((size, True), (size - 1, False), (size + 1, True)):
        (device_map,) = device_maps(on(offered), workload(), "ar", 2)
        assert device_map.fits is fits and device_map.name == "one device"
    # AR needs one tower, the others two; two devices hold one each.
    assert needed("diffusion") > 1.8 * size
    assert needed("diffusion", 2) < 1.3 * size
    one, two = device_maps(on(needed("diffusion", 2)), workload(), "diffusion", 2)
    assert (one.fits, two.fits, two.name) == (False, True, "two devices")
    assert [device.towers for device in two.devices] == [("context",), ("denoiser",)]
    assert two.devices[1].cache == two.devices[0].cache  # each has its own copy


def test_rows_and_lengths_need_memory() -> None:
    made = setup()
    (one,) = device_maps(made, workload(), "ar", 1)
    (many,) = device_maps(made, workload(batch_size=5), "ar", 1)
    assert many.devices[0].cache == 5 * one.devices[0].cache
    (long,) = device_maps(made, workload(new_tokens=116), "ar", 1)
    assert long.devices[0].cache - one.devices[0].cache == 100 * 64 * 2


def test_experts_go_to_the_host_as_far_as_they_must() -> None:
    size = needed()
    (device_map,) = device_maps(on(size - 500, host_gib=1, host_gb_s=1), workload(), "ar", 1)
    experts = 4 * 2 * 384  # of the one layer, in bfloat16
    # A layer's experts need a place to arrive in, which here is all of them.
    assert device_map.host_share == (1.0,) and device_map.host_bytes == experts
    assert not device_map.fits and device_map.devices[0].experts == experts
    deep = {"hybrid_override_pattern": "EEEE"}
    base = setup(**deep)
    (full,) = device_maps(base, workload(), "ar", 1)
    less = setup(
        machine(memory_gib=(full.devices[0].total - 5000) / GIB, host_gib=1, host_gb_s=1), **deep
    )
    (split,) = device_maps(less, workload(), "ar", 1)
    assert split.fits
    # 5000 bytes too many, and a layer's worth of 3072 bytes to arrive in.
    assert split.host_bytes == pytest.approx(5000 + 3072)
    assert split.host_share[0] == pytest.approx(8072 / (4 * 3072))
    assert split.name == "one device, 66% of the experts in host memory"
    assert split.share_of("context") == split.host_share[0]


def test_a_layer_of_experts_arrives_where_the_denoiser_has_none() -> None:
    """Silent failure: half of a layer has room to arrive in, because there are two towers."""
    config = tiny_config(hybrid_override_pattern="*EEEE")
    thin = thin_config(config, (0,), 4, DraftSpec(vocab_size=None))
    shape = ModelShape.of(describe_config(thin, "thin"))
    full, _ = device_maps(replace(setup(), shape=shape), workload(), "speculative", 2)
    short = machine(memory_gib=(full.devices[0].total - 5000) / GIB, host_gib=1, host_gb_s=1)
    less = replace(setup(short), shape=shape)
    split, _ = device_maps(less, workload(), "speculative", 2)
    assert split.host_bytes == pytest.approx(5000 + 3072)


def test_a_host_that_is_too_small() -> None:
    deep = {"hybrid_override_pattern": "EEEE"}
    (full,) = device_maps(setup(**deep), workload(), "ar", 1)
    short = (full.devices[0].total - 5000) / GIB
    for host, fits in ((8072 / 0.9 + 2, True), (8072 / 0.9 - 2, False)):
        made = setup(machine(memory_gib=short, host_gib=host / GIB, host_gb_s=1), **deep)
        (device_map,) = device_maps(made, workload(), "ar", 1)
        assert device_map.fits is fits


def test_dense_models_have_nothing_to_move() -> None:
    """Silent failure: a division by no experts, or a plan that pretends to stream a dense tower."""
    made = setup(machine(memory_gib=1000 / GIB, host_gib=1, host_gb_s=1), PROFILES["limit"],
                 hybrid_override_pattern="M*-")  # fmt: skip
    (device_map,) = device_maps(made, workload(), "ar", 1)
    assert device_map.host_share == (0.0,) and not device_map.fits
