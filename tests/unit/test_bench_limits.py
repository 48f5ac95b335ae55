"""Bytes, operations and regimes of a pass, with values computed by hand."""

import pytest
import torch

from tiny_models import fresh_model, tiny_config
from twotower.checkpoint.inspect import describe_config
from twotower.lab.bench import limits
from twotower.lab.bench.limits import (
    MeasuredPass,
    count_work,
    describe_limits,
    doubt_limits,
    measure_bandwidth,
    measure_peak,
    regime,
)
from twotower.lab.bench.passes import PassShape
from twotower.lab.plan.passes import ModelShape, PassPart, Tower


def work_of(
    pattern: str, tokens: int, logits: int, past: int, size: float, tower: Tower = "context"
) -> PassPart:
    config = tiny_config(hybrid_override_pattern=pattern)
    taken = MeasuredPass("one", "extend", 1.0, (tower, tokens, logits))
    shape = ModelShape.of(describe_config(config, "tiny"))
    return count_work(shape, taken, past, size, torch.float32)


def test_the_work_of_a_pass() -> None:
    """One layer of each kind but experts, at width 16, vocabulary 41."""
    # Mamba: in_proj 16 x 100, conv 64 x (4 + 1), out_proj 32 x 16, norm 32, three per head.
    mamba = 16 * 100 + 64 * 5 + 32 * 16 + 32 + 3 * 4
    attention = 16 * (32 + 16 + 16) + 32 * 16
    mlp = 2 * 16 * 24
    weights = mamba + attention + mlp + 4 * 16  # four norms
    head = 16 * 41
    work = work_of("M*-", tokens=4, logits=3, past=10, size=2)
    assert work.weight_bytes == 2 * (weights + head)
    # 14 tokens of 2 x 2 x 8 numbers; a state of 4 x 8 x 8 and a conv state of 64 x 3, read and
    # written; all in float32.
    assert work.cache_bytes == 4 * (14 * 32 + 2 * (256 + 192))
    # Attention: scores and sums over 10 + 2.5 keys on average by 4 heads of 8; the scan.
    assert work.operations == 4 * (2 * weights + 4 * 32 * 12.5 + 5 * 256) + 3 * 2 * head
    without = work_of("M*-", tokens=4, logits=0, past=10, size=2)
    assert work.weight_bytes - without.weight_bytes == 2 * head
    assert work.operations - without.operations == 3 * 2 * head


def test_the_denoiser_only_reads_states() -> None:
    """Its time conditioning counts too."""
    context, denoiser = (work_of("M", 4, 0, 10, 4, tower) for tower in ("context", "denoiser"))
    assert context.cache_bytes == 2 * denoiser.cache_bytes
    assert denoiser.weight_bytes > context.weight_bytes


def test_the_regime() -> None:
    assert regime(5.0, stream_ms=3.0, compute_ms=1.0) == "bandwidth-bound"
    assert regime(5.0, stream_ms=1.0, compute_ms=3.0) == "compute-bound"
    assert regime(6.1, stream_ms=1.0, compute_ms=3.0) == "overhead-bound"


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


def test_rows_of_baselines_have_their_own_weights() -> None:
    """Silent failure: llama.cpp's 8-bit weights are counted as float32, or its row is ours."""
    passes = {call: {"median": 2.0} for call in ("ar_step", "denoise_pass", "extend", "verify")}
    record = {
        "ms_by_engine": {"eager": passes},
        "engines": {
            "eager": {"ar": {"decode_ms_per_token": 3.0}},
            "llama.cpp-q8_0": {"ar": {"decode_ms_per_token": 0.5}},
            "transformers": {"ar": {"decode_ms_per_token": None}},
        },
    }
    model = fresh_model(hybrid_override_pattern="M*-")
    shape = PassShape(num_past=10, block_size=4, repeats=1, seed=0)
    rows = describe_limits(model, record, shape)
    assert [(r["engine"], r["call"], r["ms"]) for r in rows] == [
        *(("eager", call, 2.0) for call in passes),
        ("llama.cpp-q8_0", "ar_step", 0.5),
    ]
    assert rows[1]["operations"] == work_of("M*-", 4, 4, 10, 4, "denoiser").operations
    extend, q8_0 = work_of("M*-", 4, 0, 10, 4), work_of("M*-", 1, 1, 10, 34 / 32)
    for row, work in ((rows[2], extend), (rows[4], q8_0)):
        assert row["bytes"] == work.weight_bytes + work.cache_bytes
        assert row["stream_ms"] == pytest.approx(row["bytes"] / row["gbytes_per_s"] / 1e6)
        compute_ms = row["operations"] / row["goperations_per_s"] / 1e6
        assert row["compute_ms"] == pytest.approx(compute_ms)
    assert {r["regime"] for r in rows} == {"overhead-bound"}  # a tiny model in milliseconds


def test_int8_passes_are_held_against_int8_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent failure: held against the float32 peak, every int8 pass is faster than its limit."""
    peaks = {torch.float32: 1e9, torch.int8: 4e9}
    monkeypatch.setattr(limits, "measure_peak", peaks.__getitem__)
    passes = {"extend": {"median": 2.0}}
    record = {"ms_by_engine": {"native": passes, "native-int8": passes}, "engines": {}}
    model = fresh_model(hybrid_override_pattern="M*-")
    shape = PassShape(num_past=10, block_size=4, repeats=1, seed=0)
    wide, narrow = describe_limits(model, record, shape)
    assert (wide["goperations_per_s"], narrow["goperations_per_s"]) == (1.0, 4.0)
    assert narrow["compute_ms"] == pytest.approx(wide["compute_ms"] / 4)
    assert narrow["bytes"] < wide["bytes"]


def test_native_passes_of_half_precision_are_held_against_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silent failure: held against half precision's peak and half the bytes of keys, a native pass,
    which has neither, seems far from its limit.
    """
    peaks = {torch.float32: 1e9, torch.bfloat16: 2e9}
    monkeypatch.setattr(limits, "measure_peak", peaks.__getitem__)
    passes = {"extend": {"median": 2.0}}
    record = {"ms_by_engine": {"native": passes, "eager": passes}, "engines": {}}
    model = fresh_model(hybrid_override_pattern="M*-").bfloat16()
    shape = PassShape(num_past=10, block_size=4, repeats=1, seed=0)
    native, eager = describe_limits(model, record, shape)
    assert (native["goperations_per_s"], eager["goperations_per_s"]) == (1.0, 2.0)
    work = work_of("M*-", 4, 0, 10, 2)  # weights of 2 bytes, keys of 4
    assert native["bytes"] == work.weight_bytes + work.cache_bytes > eager["bytes"]
