"""From measurements and pass times to the record: what `twotower bench --json` prints.

Times are milliseconds, costs milliseconds per token.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from twotower.lab.bench.baselines import Measurement
from twotower.lab.bench.runners import AR, TimedPrompt

TARGET = 2.42  # the announcement's speed-up of diffusion over AR decoding
SPEEDUPS = (1.0, TARGET)
RATES = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)  # tokens/NFE at which the cost of a token is composed
Name = tuple[str, str]  # engine, mode
Columns = Mapping[Name, Sequence[Measurement]]  # in the order of the prompts


class Spread(NamedTuple):
    """Median and quartiles of measured values."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (inclusive); a single value is its own quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def best_ar(costs: Mapping[Name, Sequence[float]], engines: Sequence[str]) -> Name:
    """The AR runner of these engines with the lowest median cost."""
    medians = {
        c: statistics.median(values) if values else math.inf
        for c, values in costs.items()
        if c[0] in engines and c[1] == AR
    }
    assert medians, "a benchmark without AR has nothing to compare with"
    return min(medians, key=lambda name: medians[name])


def own_ar(engine: str, ours: Sequence[str]) -> Name:
    """The AR runner of an engine of ours; for a baseline, that of our first engine."""
    return (engine if engine in ours else ours[0], AR)


def paired_speedup(baseline: Sequence[float], own: Sequence[float]) -> Spread:
    """Baseline's cost over one's own, item by item: costs of the same items in the same order."""
    return spread([theirs / ours for theirs, ours in zip(baseline, own, strict=True)])


def block_cost(
    denoise_ms: float, extend_ms: float, tokens_per_nfe: float, block_size: int
) -> float:
    """Cost of a token: its share of the block's denoiser passes and of the one extension."""
    return denoise_ms / tokens_per_nfe + extend_ms / block_size


def break_even(
    ar_ms: float, denoise_ms: float, extend_ms: float, speedup: float, block_size: int
) -> float | None:
    """Tokens per pass from which blocks are `speedup` times as fast as AR; None beyond a block."""
    left = ar_ms / speedup - extend_ms / block_size  # what a token may cost in passes
    if left <= 0:
        return None
    needed = denoise_ms / left
    return needed if needed <= block_size else None


def cycle_break_even(ar_ms: float, denoise_ms: float, verify_ms: float, speedup: float) -> float:
    """Tokens that a cycle of one draft pass and one verification must accept for the speed-up."""
    return speedup * (denoise_ms + verify_ms) / ar_ms


def summarise_measurements(columns: Columns, ours: Sequence[str]) -> dict[str, Any]:
    """`engines` and the best AR of a size; `ours` names our engines.

    Costs include prefill; those that begin with `decode` do not.
    """
    costs = {name: [one.ms_per_token for one in column] for name, column in columns.items()}
    decode_costs = {name: _decode_costs(column) for name, column in columns.items()}
    everyone = [engine for engine, _ in columns]
    best, best_decode = best_ar(costs, everyone), best_ar(decode_costs, everyone)
    engines: dict[str, dict[str, Any]] = {}
    for name, column in columns.items():
        record = _costs(column)
        own = own_ar(name[0], ours)
        for against, whole, decode in (("best_ar", best, best_decode), ("own_ar", own, own)):
            record |= _quartiled(f"speedup_vs_{against}", paired_speedup(costs[whole], costs[name]))
            record |= _quartiled(
                f"decode_speedup_vs_{against}", _decode_speedup(columns[decode], column)
            )
        engines.setdefault(name[0], {})[name[1]] = record
    return {
        "engines": engines,
        "best_ar": list(best),
        "best_ar_decode": list(best_decode),
        # Where no answer has two tokens, prefill is all that there is.
        "best_ar_decode_ms": spread(decode_costs[best_decode] or costs[best_decode]).median,
        "n": len(columns[best]),
    }


def measure_quality(
    columns: Columns,
    ours: Sequence[str],
    prompts: Sequence[TimedPrompt],
    decode: Callable[[list[int]], str],
) -> dict[Name, dict[str, Any]]:
    """Of each runner its right answers, and those that equal its own AR's token by token: the same
    engine's, so that another one's rounding is not taken for a lossy mode.
    """
    found = {}
    for name, column in columns.items():
        right = sum(
            prompt.is_right is not None and prompt.is_right(decode(one.tokens))
            for prompt, one in zip(prompts, column, strict=True)
        )
        pairs = zip(column, columns[own_ar(name[0], ours)], strict=True)
        same = sum(one.tokens == other.tokens for one, other in pairs)
        quality = {"correct": right, "accuracy": right / len(column)}
        found[name] = {**quality, "same_tokens_as_own_ar": same}
    return found


def summarise_passes(
    times: Mapping[tuple[str, str], Sequence[float]], best_ar_ms: float, block_size: int
) -> dict[str, Any]:
    """Spreads of all passes, ratios, and where block decoding breaks even.

    best_ar_ms: what a token costs the fastest AR decoder of the size, prefill apart.
    """
    by_engine: dict[str, dict[str, Any]] = {}
    for (engine, call), values in times.items():
        median, *quartiles = spread(values)
        record = {"median": median, "quartiles": quartiles, "n": len(values)}
        by_engine.setdefault(engine, {})[call] = record
    return {
        "ms_by_engine": by_engine,
        "pays": {
            engine: when_it_pays(
                {call: found["median"] for call, found in calls.items()}, best_ar_ms, block_size
            )
            for engine, calls in by_engine.items()
        },
    }


def when_it_pays(ms: Mapping[str, float], best_ar_ms: float, block_size: int) -> dict[str, Any]:
    """Ratios of an engine's passes and the break-even against its own AR and against the best."""
    step, denoise, extend, verify = (
        ms[call] for call in ("ar_step", "denoise_pass", "extend", "verify")
    )

    def by_speedup(needed: Callable[[float, float], float | None]) -> dict[str, Any]:
        compared = {"own_ar": step, "best_ar": best_ar_ms}
        return {
            name: {f"{speedup:g}": needed(ar_ms, speedup) for speedup in SPEEDUPS}
            for name, ar_ms in compared.items()
        }

    return {
        "denoise_per_ar_step": denoise / step,
        "extend_per_ar_step": extend / step,
        "verify_per_ar_step": verify / step,
        "needed_tokens_per_nfe": by_speedup(
            lambda ar_ms, speedup: break_even(ar_ms, denoise, extend, speedup, block_size)
        ),
        "needed_tokens_per_cycle": by_speedup(
            lambda ar_ms, speedup: cycle_break_even(ar_ms, denoise, verify, speedup)
        ),
        "speedup_vs_best_ar_at_tokens_per_nfe": {
            f"{rate:g}": best_ar_ms / block_cost(denoise, extend, rate, block_size)
            for rate in RATES
            if rate <= block_size
        },
    }


def _costs(column: Sequence[Measurement]) -> dict[str, Any]:
    tokens, nfe = sum(len(one.tokens) for one in column), sum(one.nfe for one in column)
    decode = _decode_costs(column)
    return {
        **_quartiled("ms_per_token", spread([one.ms_per_token for one in column])),
        **_quartiled("decode_ms_per_token", spread(decode) if decode else None),
        "tokens_per_s": tokens / sum(one.seconds for one in column),
        "tokens": tokens,
        "nfe": nfe,
        "tokens_per_nfe": tokens / nfe if nfe else None,
        "context_forwards": sum(one.context_forwards for one in column),
        "n": len(column),
    }


def _decode_costs(column: Sequence[Measurement]) -> list[float]:
    return [cost for one in column if (cost := one.decode_ms_per_token) is not None]


def _decode_speedup(
    baseline: Sequence[Measurement], column: Sequence[Measurement]
) -> Spread | None:
    """Speed-up without prefill, over prompts of which both decoded anything."""
    ratios = [
        before / after
        for theirs, ours in zip(baseline, column, strict=True)
        if (before := theirs.decode_ms_per_token) is not None
        and (after := ours.decode_ms_per_token) is not None
    ]
    return spread(ratios) if ratios else None


def _quartiled(name: str, found: Spread | None) -> dict[str, Any]:
    median, *quartiles = found or (None, None, None)
    return {name: median, f"{name}_quartiles": quartiles}
