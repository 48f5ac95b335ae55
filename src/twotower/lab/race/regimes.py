"""Each pass of a size beside what the machine allows: which limit rules it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from twotower.lab.race.limits import Machine, Work, cache_bytes, pass_limit, pass_work, regime
from twotower.lab.race.passes import PassShape
from twotower.model import TwoTower

# Bytes of a weight by the end of an engine's name; q8_0 has one 2-byte scale per 32 weights.
_WEIGHT_BYTES = {"-f32": 4.0, "-f16": 2.0, "-bf16": 2.0, "-q8_0": 34 / 32, "-int8": 1.0}
_CREDIBLE = 0.8  # of its limit: the least time that a pass can have taken


class Row(NamedTuple):
    """A measured pass: milliseconds, tokens it reads, positions with logits, bytes of a weight."""

    engine: str
    call: str
    ms: float
    num_tokens: int
    num_logits: int
    weight_bytes: float


def describe_limits(
    model: TwoTower, record: Mapping[str, object], shape: PassShape, machine: Machine
) -> list[dict[str, object]]:
    """A row per pass of ours and per rival's AR token: bytes, operations, limits, regime.

    Bandwidth is measured with a buffer as large as the weights, so that small models are held
    against the cache's. Rivals compute in float32 whatever their weights are, our int8 in int8.
    """
    dtype = model.context_lm_head.weight.dtype
    ours = list(_our_rows(record, shape, float(dtype.itemsize)))
    rivals = list(_rival_rows(record, {row.engine for row in ours}, float(dtype.itemsize)))
    found = []
    for row in [*ours, *rivals]:
        work = pass_work(
            model.config, row.num_tokens, shape.num_past, row.num_logits, row.weight_bytes
        )
        computes_in = torch.float32 if row in rivals else dtype
        if row in ours and row.engine.endswith("-int8"):
            computes_in = torch.int8
        peak = machine.operations_per_s(computes_in)
        found.append(_describe_row(row, work, machine.bytes_per_s(work.weight_bytes), peak))
    return found


def _our_rows(record: Mapping[str, object], shape: PassShape, weight_bytes: float) -> Iterator[Row]:
    by_engine = record["ms_by_engine"]
    assert isinstance(by_engine, dict)
    size = shape.block_size
    # What `passes.py` calls: tokens read, positions whose logits are made.
    tokens = {
        "ar_step": (1, 1),
        "denoise_pass": (size, size),
        "extend": (size, 0),
        "verify": (size, size),
    }
    for engine, calls in by_engine.items():
        for call, found in calls.items():
            size_of_one = weight_bytes_of(engine, weight_bytes)
            yield Row(engine, call, found["median"], *tokens[call], size_of_one)


def _rival_rows(record: Mapping[str, object], ours: set[str], weight_bytes: float) -> Iterator[Row]:
    engines = record["engines"]
    assert isinstance(engines, dict)
    for engine, modes in engines.items():
        ms = modes.get("ar", {}).get("decode_ms_per_token")
        if engine not in ours and ms is not None:
            yield Row(engine, "ar_step", ms, 1, 1, weight_bytes_of(engine, weight_bytes))


def weight_bytes_of(engine: str, otherwise: float) -> float:
    """Bytes of a weight in an engine whose name ends in its precision; else the model's."""
    return next((size for end, size in _WEIGHT_BYTES.items() if engine.endswith(end)), otherwise)


def _describe_row(row: Row, work: Work, bandwidth: float, peak: float) -> dict[str, object]:
    limit = pass_limit(work, bandwidth, peak)
    largest_cache = cache_bytes()
    return {
        "engine": row.engine,
        "call": row.call,
        "ms": row.ms,
        "bytes": work.total_bytes,
        "operations": work.operations,
        "gbytes_per_s": bandwidth / 1e9,
        "goperations_per_s": peak / 1e9,
        "stream_ms": limit.stream_ms,
        "compute_ms": limit.compute_ms,
        "is_in_cache": None if largest_cache is None else work.weight_bytes <= largest_cache,
        "regime": regime(row.ms, limit),
    }


def doubt_limits(size: str, rows: Sequence[Mapping[str, object]]) -> list[str]:
    """A line if a pass took clearly less than its limit: then the limit was measured too low."""
    for row in rows:
        ms, stream_ms, compute_ms = (float(str(row[k])) for k in ("ms", "stream_ms", "compute_ms"))
        if ms < _CREDIBLE * max(stream_ms, compute_ms):
            return [
                f"{size}: {row['engine']} {row['call']} took {ms:.2f} ms, less than its limit of "
                f"{max(stream_ms, compute_ms):.2f} ms; the limits were measured on a busy machine"
            ]
    return []
