"""Bytes, operations and regimes of a pass, with values computed by hand."""

import pytest
import torch

from tiny_models import tiny_config
from twotower.race.limits import (
    Limit,
    measure_bandwidth,
    measure_peak,
    pass_limit,
    pass_work,
    regime,
)


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
