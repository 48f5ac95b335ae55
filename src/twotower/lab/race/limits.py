"""What a pass must move and compute, what the machine can, and which of the two rules.

A pass streams its tower's weights, keys and states once and multiplies each weight with every
token. Bandwidth and arithmetic peak are measured here, not taken from a data sheet.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from twotower.checkpoint.empty import build_empty
from twotower.config import AttentionSpec, MoESpec, TwoTowerConfig
from twotower.native.layout import LANES
from twotower.native.packing import quantise
from twotower.native.tower import NativeLinear

Regime = Literal["overhead-bound", "compute-bound", "bandwidth-bound"]
OVERHEAD = 2.0  # above so many times its limit, a pass waits for something else
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_GEMM = 1024  # rows and columns of the matrices that measure the peak
_LEAST_READ = 2**20  # bytes; below, a timed read would be all overhead
_SECONDS = 0.3  # least time of a measurement


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one pass moves (bytes, each once) and computes (operations; a multiply-add is two)."""

    weight_bytes: float
    state_bytes: float
    operations: float

    @property
    def total_bytes(self) -> float:
        return self.weight_bytes + self.state_bytes


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The least time of a pass on this machine, by what it moves and by what it computes."""

    stream_ms: float
    compute_ms: float

    @property
    def ms(self) -> float:
        return max(self.stream_ms, self.compute_ms)


class Machine:
    """What this machine can, measured once per size of buffer and once per dtype."""

    def __init__(self) -> None:
        self._bandwidths: dict[int, float] = {}
        self._peaks: dict[torch.dtype, float] = {}

    def bytes_per_s(self, num_bytes: float) -> float:
        """Bandwidth of reading a buffer of this size again and again."""
        size = max(_LEAST_READ, round(num_bytes))
        if size not in self._bandwidths:
            self._bandwidths[size] = measure_bandwidth(size)
        return self._bandwidths[size]

    def operations_per_s(self, dtype: torch.dtype) -> float:
        """Arithmetic peak in a dtype."""
        if dtype not in self._peaks:
            self._peaks[dtype] = measure_peak(dtype)
        return self._peaks[dtype]


def pass_work(
    config: TwoTowerConfig, num_tokens: int, num_past: int, num_logits: int, weight_bytes: float
) -> Work:
    """Work of one pass of a tower over num_tokens after num_past, its head over num_logits of them.

    weight_bytes: of one weight; keys and values take as much, SSM states are float32, read and
    written. Experts count as often as different ones can be chosen. The arithmetic of norms and of
    the convolution and the denoiser's time conditioning are left out: a few per cent at most.
    """
    tower = config.context
    head = tower.hidden_size * tower.vocab_size
    weights = _streamed_weights(config, num_tokens) + (head if num_logits else 0)
    keys = tower.kv_elements * (num_past + num_tokens) * weight_bytes
    states = 2 * 4 * tower.ssm_elements
    queries = sum(one.num_heads * one.head_dim for one in tower.layers_of(AttentionSpec))
    scan = 5 * tower.ssm_elements  # decay, outer product, sum; readout
    mixing = 4 * queries * (num_past + num_tokens) + scan
    active = _streamed_weights(config, 1)
    return Work(
        weight_bytes=weights * weight_bytes,
        state_bytes=keys + states,
        operations=num_tokens * (2 * active + mixing) + num_logits * 2 * head,
    )


def _streamed_weights(config: TwoTowerConfig, num_tokens: int) -> float:
    """Weights of a tower that num_tokens tokens touch: no embedding table, and of the experts at
    most as many as are chosen.
    """
    model = build_empty(config, "context")
    total = 0.0
    moe = config.context.shared_spec(MoESpec)
    share = 1.0 if moe is None else min(1.0, num_tokens * moe.experts_per_token / moe.num_experts)
    for name, parameter in model.context_tower.named_parameters():
        if not name.startswith("embeddings."):
            total += parameter.numel() * (share if ".experts." in name else 1.0)
    return total


def pass_limit(work: Work, bytes_per_s: float, operations_per_s: float) -> Limit:
    """The least time of the work at a bandwidth and a peak."""
    return Limit(
        stream_ms=1e3 * work.total_bytes / bytes_per_s,
        compute_ms=1e3 * work.operations / operations_per_s,
    )


def regime(measured_ms: float, limit: Limit) -> Regime:
    """What a pass waits for: neither limit explains more than half of it, or the larger one."""
    if measured_ms > OVERHEAD * limit.ms:
        return "overhead-bound"
    return "bandwidth-bound" if limit.stream_ms >= limit.compute_ms else "compute-bound"


def measure_bandwidth(num_bytes: float) -> float:
    """Bytes per second at which the cores read num_bytes again and again.

    The better of a sum and of a matrix-vector product: from memory for large sizes, from the cache
    for those that fit into it.
    """
    rows = max(1, int(num_bytes) // (4 * 1024))
    matrix, vector = torch.ones(rows, 1024), torch.ones(1024)
    fastest = min(_best_seconds(lambda: matrix @ vector), _best_seconds(matrix.sum))
    return matrix.numel() * 4 / fastest


def measure_peak(dtype: torch.dtype) -> float:
    """Operations per second of the fastest matrix product there is in a dtype: PyTorch's of large
    matrices, or our own of 16 tokens, which uses instructions that a vendor's library may not.
    """
    numbers = torch.ones(_GEMM, _GEMM, dtype=dtype)
    product = torch._int_mm if dtype == torch.int8 else torch.mm  # the former sums in int32
    found = 2 * _GEMM**3 / _best_seconds(lambda: product(numbers, numbers))
    return max(found, _measure_own_product(dtype))


def _measure_own_product(dtype: torch.dtype) -> float:
    """Operations per second of our native products; 0 where there are none in the dtype."""
    if dtype not in (torch.float32, torch.int8):
        return 0.0
    weight, tokens = torch.ones(2 * _GEMM, 2 * _GEMM), torch.ones(LANES, 2 * _GEMM)
    try:
        linear = NativeLinear(quantise(weight) if dtype == torch.int8 else weight)
    except OSError:
        return 0.0
    return 2 * weight.numel() * len(tokens) / _best_seconds(lambda: linear(tokens))


def cache_bytes() -> int | None:
    """Size of the largest cache of a core; None where the system does not tell."""
    sizes = []
    for file in _CACHE.glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(1024 * int(text[:-1]))
    return max(sizes, default=None)


def _best_seconds(call: Callable[[], object]) -> float:
    """The fastest of at least five calls: a limit is what the machine can, not what it mostly does.

    The first call is not counted.
    """
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < _SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
