"""Bytes, operations and regimes of a pass, with values computed by hand."""

import pytest
import torch

from tiny_models import fresh_model, tiny_config
from twotower.lab.race.limits import (
    Limit,
    Machine,
    measure_bandwidth,
    measure_peak,
    pass_limit,
    pass_work,
    regime,
)
from twotower.lab.race.passes import PassShape
from twotower.lab.race.regimes import describe_limits, doubt_limits


def test_the_work_of_a_pass() -> None:
    """One layer of each kind but experts, at width 16, vocabulary 41."""
    config = tiny_config(hybrid_override_pattern="M*-")
    # Mamba: in_proj 16 x 100, conv 64 x (4 + 1), out_proj 32 x 16, norm 32, three per head.
    mamba = 16 * 100 + 64 * 5 + 32 * 16 + 32 + 3 * 4
    attention = 16 * (32 + 16 + 16) + 32 * 16
    mlp = 2 * 16 * 24
    weights = mamba + attention + mlp + 4 * 16  # four norms
    head = 16 * 41
    work = pass_work(config, num_tokens=4, num_past=10, num_logits=3, weight_bytes=2)
    assert work.weight_bytes == 2 * (weights + head)
    # 14 tokens of 2 x 2 x 8 numbers; a state of 4 x 8 x 8 float32, read and written.
    assert work.state_bytes == 14 * 32 * 2 + 256 * 4 * 2
    # Attention: scores and sums over 14 keys by 4 heads of 8.
    assert work.operations == 4 * (2 * weights + 4 * 32 * 14 + 5 * 256) + 3 * 2 * head
    without = pass_work(config, num_tokens=4, num_past=10, num_logits=0, weight_bytes=2)
    assert work.weight_bytes - without.weight_bytes == 2 * head
    assert work.operations - without.operations == 3 * 2 * head


def test_experts_count_as_far_as_they_are_chosen() -> None:
    config = tiny_config(hybrid_override_pattern="E")
    few, many = (pass_work(config, n, 0, 0, 1).weight_bytes for n in (1, 16))
    assert many - few == 2 * (2 * 16 * 12)  # 4 experts in place of the 2 of one token
    # A token multiplies with its own two experts, however many the pass streams.
    assert pass_work(config, 16, 0, 0, 1).operations == 16 * 2 * few


def test_the_limit_and_the_regime() -> None:
    work = pass_work(tiny_config(), 4, 10, 4, 4)
    limit = pass_limit(work, bytes_per_s=1e6, operations_per_s=1e9)
    assert limit.stream_ms == pytest.approx(work.total_bytes / 1e3)
    assert limit.compute_ms == pytest.approx(work.operations / 1e6)
    assert limit.ms == limit.stream_ms
    assert regime(5.0, Limit(stream_ms=3.0, compute_ms=1.0)) == "bandwidth-bound"
    assert regime(5.0, Limit(stream_ms=1.0, compute_ms=3.0)) == "compute-bound"
    assert regime(6.1, Limit(stream_ms=1.0, compute_ms=3.0)) == "overhead-bound"


def test_measured_limits_are_physical() -> None:
    """Between a slow tablet and the fastest server: a wrong unit is off by thousands."""
    assert 1e8 < measure_bandwidth(2**20) < 1e13
    assert 1e8 < measure_peak(torch.float32) < 1e14
    assert 1e8 < measure_peak(torch.int8) < 1e15


def row(ms: float) -> dict[str, object]:
    return {"engine": "native", "call": "extend", "ms": ms, "stream_ms": 4.0, "compute_ms": 10.0}


def test_a_pass_below_its_limit_is_doubted() -> None:
    """Silent failure: a peak measured beside a training run makes every pass look compute-bound."""
    assert doubt_limits("160M", [row(8.1), row(40.0)]) == []
    (line,) = doubt_limits("160M", [row(8.1), row(7.9), row(1.0)])
    assert line.startswith("160M: native extend took 7.90 ms, less than its limit of 10.00 ms")


def test_rivals_rows_have_their_own_weights() -> None:
    """Silent failure: llama.cpp's 8-bit weights are counted as float32, or its row is ours."""
    passes = {call: {"median": 2.0} for call in ("ar_step", "denoise_pass", "extend", "verify")}
    record = {
        "ms_by_engine": {"pytorch": passes},
        "engines": {
            "pytorch": {"ar": {"decode_ms_per_token": 3.0}},
            "llama.cpp-q8_0": {"ar": {"decode_ms_per_token": 0.5}},
            "transformers": {"ar": {"decode_ms_per_token": None}},
        },
    }
    config = tiny_config(hybrid_override_pattern="M*-")
    model = fresh_model(hybrid_override_pattern="M*-")
    shape = PassShape(num_past=10, block_size=4, repeats=1, seed=0)
    rows = describe_limits(model, record, shape, Machine())
    assert [(r["engine"], r["call"], r["ms"]) for r in rows] == [
        *(("pytorch", call, 2.0) for call in passes),
        ("llama.cpp-q8_0", "ar_step", 0.5),
    ]
    assert rows[1]["operations"] == pass_work(config, 4, 10, 4, 4).operations
    assert rows[2]["bytes"] == pass_work(config, 4, 10, 0, 4).total_bytes
    assert rows[4]["bytes"] == pass_work(config, 1, 10, 1, 34 / 32).total_bytes
    assert {r["regime"] for r in rows} == {"overhead-bound"}  # a tiny model in milliseconds


def test_int8_passes_are_held_against_int8_arithmetic() -> None:
    """Silent failure: held against the float32 peak, every int8 pass is faster than its limit."""
    peaks = {torch.float32: 1e9, torch.int8: 4e9}
    machine = Machine()
    machine._peaks |= peaks
    passes = {"extend": {"median": 2.0}}
    record = {"ms_by_engine": {"native": passes, "native-int8": passes}, "engines": {}}
    model = fresh_model(hybrid_override_pattern="M*-")
    shape = PassShape(num_past=10, block_size=4, repeats=1, seed=0)
    wide, narrow = describe_limits(model, record, shape, machine)
    assert (wide["goperations_per_s"], narrow["goperations_per_s"]) == (1.0, 4.0)
    assert narrow["compute_ms"] == pytest.approx(wide["compute_ms"] / 4)
    assert narrow["bytes"] < wide["bytes"]
