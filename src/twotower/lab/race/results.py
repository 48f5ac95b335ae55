"""From laps and pass times to the record: what `twotower bench --json` prints."""

from collections.abc import Callable, Mapping, Sequence

from twotower.lab.race.contest import Contestant, Heat, Lap
from twotower.lab.race.costs import (
    TARGET,
    Spread,
    best_ar,
    block_cost,
    break_even,
    cycle_break_even,
    own_ar,
    paired_speedup,
    spread,
    tokens_per_nfe,
)

Decode = Callable[[list[int]], str]
Laps = Sequence[Sequence[Lap]]  # by heat, then by contestant
SPEEDUPS = (1.0, TARGET)
RATES = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)  # tokens/NFE at which the cost of a token is composed


def summarise_laps(
    contestants: Sequence[Contestant], heats: Sequence[Heat], laps: Laps, ours: Sequence[str]
) -> dict[str, object]:
    """`engines` and the best AR contestants of a size; `ours` names our engines.

    Costs include reading the prompt; those that begin with `decode` do not.
    """
    names = [(c.engine, c.mode) for c in contestants]
    columns = {name: [row[at] for row in laps] for at, name in enumerate(names)}
    costs = {name: [lap.ms_per_token for lap in column] for name, column in columns.items()}
    everyone = [engine for engine, _ in names]
    decode_costs = {name: _decode_costs(column) for name, column in columns.items()}
    best, best_decode = best_ar(costs, everyone), best_ar(decode_costs, everyone)
    our, our_decode = best_ar(costs, ours), best_ar(decode_costs, ours)
    engines: dict[str, dict[str, object]] = {}
    for name, column in columns.items():
        record = _costs(column)
        own = own_ar(name[0], ours)
        for against, baseline in (("best_ar", best), ("our_ar", our), ("own_ar", own)):
            found = paired_speedup(costs[baseline], costs[name])
            record |= _quartiled(f"speedup_vs_{against}", found)
        for against, baseline in (
            ("best_ar", best_decode), ("our_ar", our_decode), ("own_ar", own),
        ):  # fmt: skip
            speedup = _decode_speedup(columns[baseline], column)
            record |= _quartiled(f"decode_speedup_vs_{against}", speedup)
        engines.setdefault(name[0], {})[name[1]] = record
    return {
        "engines": engines,
        "best_ar": list(best),
        "our_best_ar": list(our),
        "best_ar_decode": list(best_decode),
        # Where no answer has two tokens, reading the prompt is all that there is.
        "best_ar_decode_ms": spread(decode_costs[best_decode] or costs[best_decode]).median,
        "n": len(heats),
    }


def count_right(
    contestants: Sequence[Contestant], heats: Sequence[Heat], laps: Laps, decode: Decode
) -> dict[tuple[str, str], int]:
    """Right answers of each contestant; heats that cannot be judged count as wrong."""
    right = {(c.engine, c.mode): 0 for c in contestants}
    for heat, row in zip(heats, laps, strict=True):
        for contestant, lap in zip(contestants, row, strict=True):
            if heat.is_right is not None and heat.is_right(decode(lap.tokens)):
                right[contestant.engine, contestant.mode] += 1
    return right


def count_same(
    contestants: Sequence[Contestant], laps: Laps, ours: Sequence[str]
) -> dict[tuple[str, str], int]:
    """Answers of each contestant that equal its own AR's token by token: the same engine's, so that
    another one's rounding is not taken for a lossy mode.
    """
    names = [(c.engine, c.mode) for c in contestants]
    columns = {name: [row[at].tokens for row in laps] for at, name in enumerate(names)}
    same = {}
    for (engine, mode), column in columns.items():
        reference = columns[own_ar(engine, ours)]
        pairs = zip(column, reference, strict=True)
        same[engine, mode] = sum(mine == theirs for mine, theirs in pairs)
    return same


def summarise_passes(
    times: Mapping[tuple[str, str], Sequence[float]], best_ar_ms: float, block_size: int
) -> dict[str, object]:
    """`ms` of the first engine, spreads of all, ratios, and where block decoding breaks even.

    best_ar_ms: what a token costs the fastest AR decoder of the size, reading the prompt apart.
    """
    spreads = {key: spread(values) for key, values in times.items()}
    engines = list(dict.fromkeys(engine for engine, _ in spreads))
    by_engine = {
        engine: {call: found for (name, call), found in spreads.items() if name == engine}
        for engine in engines
    }
    return {
        "ms": {call: found.median for call, found in by_engine[engines[0]].items()},
        "ms_by_engine": {
            engine: {call: found.to_dict() for call, found in calls.items()}
            for engine, calls in by_engine.items()
        },
        "pays": {
            engine: when_it_pays(
                {call: found.median for call, found in calls.items()}, best_ar_ms, block_size
            )
            for engine, calls in by_engine.items()
        },
    }


def when_it_pays(ms: Mapping[str, float], best_ar_ms: float, block_size: int) -> dict[str, object]:
    """Ratios of an engine's passes and the break-even against its own AR and against the best."""
    step, denoise, extend, verify = (
        ms[call] for call in ("ar_step", "denoise_pass", "extend", "verify")
    )
    return {
        "denoise_per_ar_step": denoise / step,
        "extend_per_ar_step": extend / step,
        "verify_per_ar_step": verify / step,
        "needed_tokens_per_nfe": {
            name: {
                f"{speedup:g}": break_even(ar_ms, denoise, extend, speedup, block_size)
                for speedup in SPEEDUPS
            }
            for name, ar_ms in (("own_ar", step), ("best_ar", best_ar_ms))
        },
        "needed_tokens_per_cycle": {
            name: {
                f"{speedup:g}": cycle_break_even(ar_ms, denoise, verify, speedup)
                for speedup in SPEEDUPS
            }
            for name, ar_ms in (("own_ar", step), ("best_ar", best_ar_ms))
        },
        "speedup_vs_best_ar_at_tokens_per_nfe": {
            f"{rate:g}": best_ar_ms / block_cost(denoise, extend, rate, block_size)
            for rate in RATES
            if rate <= block_size
        },
    }


def _costs(column: Sequence[Lap]) -> dict[str, object]:
    tokens, nfe = sum(len(lap.tokens) for lap in column), sum(lap.nfe for lap in column)
    whole = spread([lap.ms_per_token for lap in column])
    decode = _decode_costs(column)
    seconds = sum(lap.seconds for lap in column)
    return {
        "ms_per_token": whole.median,
        "ms_per_token_quartiles": [whole.low, whole.high],
        **_quartiled("decode_ms_per_token", spread(decode) if decode else None),
        "tokens_per_s": tokens / seconds,
        "tokens": tokens,
        "nfe": nfe,
        "tokens_per_nfe": tokens_per_nfe(tokens, nfe),
        "context_forwards": sum(lap.context_forwards for lap in column),
        "n": len(column),
    }


def _decode_costs(column: Sequence[Lap]) -> list[float]:
    return [cost for lap in column if (cost := lap.decode_ms_per_token) is not None]


def _decode_speedup(baseline: Sequence[Lap], column: Sequence[Lap]) -> Spread | None:
    """Speed-up without reading the prompt, over heats in which both decoded anything."""
    pairs = [
        (before, after)
        for theirs, ours in zip(baseline, column, strict=True)
        if (before := theirs.decode_ms_per_token) is not None
        and (after := ours.decode_ms_per_token) is not None
    ]
    if not pairs:
        return None
    return paired_speedup([before for before, _ in pairs], [after for _, after in pairs])


def _quartiled(name: str, found: Spread | None) -> dict[str, object]:
    if found is None:
        return {name: None, f"{name}_quartiles": [None, None]}
    return {name: found.median, f"{name}_quartiles": [found.low, found.high]}
