"""Each pass beside the least time that the machine allows: which limit rules it.

A pass streams its tower's weights, keys and states once and multiplies each weight with every
token, as `lab.plan` counts them. Bandwidth and arithmetic peak are measured here, not taken from a
data sheet.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from twotower.checkpoint.inspect import Tower, describe_config
from twotower.kernels.quantised import to_eight_bits
from twotower.lab.bench.passes import PassShape
from twotower.lab.plan.inputs import uniform
from twotower.lab.plan.passes import AR_STEP, ModelShape, Pass, PassPart, call_shapes, pass_parts
from twotower.lab.report import Record
from twotower.model import TwoTower
from twotower.native.layout import LANES
from twotower.native.weights import native_linear

Regime = Literal["overhead-bound", "compute-bound", "bandwidth-bound"]
NATIVE = "native"  # how the names of those engines begin, which compute in float32
OVERHEAD = 2.0  # above so many times its limit, a pass waits for something else
_CREDIBLE = 0.8  # of its limit: the least time that a pass can have taken
# Bytes of a weight by the end of an engine's name; q8_0 has one 2-byte scale per 32 weights.
_WEIGHT_BYTES = {"-f32": 4.0, "-f16": 2.0, "-bf16": 2.0, "-q8_0": 34 / 32}
_WEIGHT_BYTES |= {"-int8": 1.0, "-int4": 5 / 8}  # ours: int4 has its scales beside it
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_GEMM = 1024  # rows and columns of the matrices that measure the peak
_MIN_READ = 2**20  # bytes; below, a timed read would be all overhead
_SECONDS = 0.3  # least time of a measurement


class MeasuredPass(NamedTuple):
    """A pass of an engine (its tower, tokens read, positions with logits), how long it took, and
    the precision of its arithmetic: our own, int8 with weights of few bits, a baseline's float32.
    """

    engine: str
    call: str
    ms: float
    shape: tuple[Tower, int, int]
    dtype: torch.dtype = torch.float32


def describe_limits(model: TwoTower, record: Record, shape: PassShape) -> list[dict[str, Any]]:
    """A row per pass of ours, or token of a baseline, against a buffer as large as its weights."""
    dtype = model.context_lm_head.weight.dtype
    planned = ModelShape.of(describe_config(model.config, "bench"))
    rows = []
    for taken in _measured_passes(record, shape.block_size, dtype):
        size = weight_bytes_of(taken.engine, float(dtype.itemsize))
        kept = torch.float32 if taken.engine.startswith(NATIVE) else dtype  # keys and values
        rows.append(_describe(taken, count_work(planned, taken, shape.num_past, size, kept)))
    return rows


def count_work(
    shape: ModelShape, taken: MeasuredPass, num_past: int, weight_bytes: float, dtype: torch.dtype
) -> PassPart:
    """Work of one row's pass with weights of so many bytes each, keys and values in `dtype`."""
    widths = uniform("float32" if dtype == torch.float32 else "bfloat16")
    tower, tokens, logits = taken.shape
    call = Pass(tower=tower, rows=1, tokens=tokens, logits=logits, past=num_past)
    parts = pass_parts(shape, call, widths)
    return PassPart(
        taken.call,
        sum(part.weight_bytes for part in parts) * weight_bytes / dtype.itemsize,
        sum(part.cache_bytes for part in parts),
        sum(part.operations for part in parts),
    )


def _measured_passes(record: Record, size: int, dtype: torch.dtype) -> Iterator[MeasuredPass]:
    """Our passes over blocks of a size, then a token of each baseline."""
    calls, ours = call_shapes(size), record["ms_by_engine"]
    for engine, times in ours.items():
        computed = torch.float32 if engine.startswith(NATIVE) else dtype
        own = torch.int8 if engine.endswith(("-int8", "-int4")) else computed
        for call, found in times.items():
            yield MeasuredPass(engine, call, found["median"], calls[call], own)
    for engine, modes in record["engines"].items():
        ms = modes.get("ar", {}).get("decode_ms_per_token")
        if engine not in ours and ms is not None:
            yield MeasuredPass(engine, AR_STEP, ms, calls[AR_STEP])


def weight_bytes_of(engine: str, otherwise: float) -> float:
    """Bytes of a weight in an engine whose name ends in its precision; else the model's."""
    return next((size for end, size in _WEIGHT_BYTES.items() if engine.endswith(end)), otherwise)


def _describe(taken: MeasuredPass, work: PassPart) -> dict[str, Any]:
    bandwidth = measure_bandwidth(max(_MIN_READ, round(work.weight_bytes)))
    peak = measure_peak(taken.dtype)
    num_bytes = work.weight_bytes + work.cache_bytes
    stream_ms, compute_ms = 1e3 * num_bytes / bandwidth, 1e3 * work.operations / peak
    largest_cache = cache_bytes()
    return {
        "engine": taken.engine,
        "call": taken.call,
        "ms": taken.ms,
        "bytes": num_bytes,
        "operations": work.operations,
        "gbytes_per_s": bandwidth / 1e9,
        "goperations_per_s": peak / 1e9,
        "stream_ms": stream_ms,
        "compute_ms": compute_ms,
        "is_in_cache": None if largest_cache is None else work.weight_bytes <= largest_cache,
        "regime": regime(taken.ms, stream_ms, compute_ms),
    }


def regime(measured_ms: float, stream_ms: float, compute_ms: float) -> Regime:
    """What a pass waits for: neither limit explains more than half of it, or the larger one."""
    if measured_ms > OVERHEAD * max(stream_ms, compute_ms):
        return "overhead-bound"
    return "bandwidth-bound" if stream_ms >= compute_ms else "compute-bound"


def doubt_limits(size: str, rows: Sequence[Record]) -> list[str]:
    """A line if a pass took clearly less than its limit: then the limit was measured too low."""
    for row in rows:
        limit = max(row["stream_ms"], row["compute_ms"])
        if row["ms"] < _CREDIBLE * limit:
            return [
                f"{size}: {row['engine']} {row['call']} took {row['ms']:.2f} ms, less than its "
                f"limit of {limit:.2f} ms; the limits were measured on a busy machine"
            ]
    return []


@cache
def measure_bandwidth(num_bytes: int) -> float:
    """Bytes per second of reading a buffer again and again: the better of a sum and a product."""
    rows = max(1, num_bytes // (4 * 1024))
    matrix, vector = torch.ones(rows, 1024), torch.ones(1024)
    fastest = min(_best_seconds(lambda: matrix @ vector), _best_seconds(matrix.sum))
    return matrix.numel() * 4 / fastest


@cache
def measure_peak(dtype: torch.dtype) -> float:
    """Operations per second of a dtype's fastest product: PyTorch's, or ours of 16 tokens."""
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
        linear = native_linear(to_eight_bits(weight) if dtype == torch.int8 else weight)
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
    """The fastest of five calls or more: what the machine can. The first call is not counted."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < _SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
