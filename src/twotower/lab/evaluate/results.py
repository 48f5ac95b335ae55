"""From judged items to the results record: what `--json` prints and results.json holds."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from twotower.engine import GenerateOptions, defaults_of, resolve_options
from twotower.lab.corpus import Document
from twotower.lab.evaluate.run import Answer, Item, Subject, Trace, evaluate
from twotower.lab.evaluate.suite import Judge

BASELINE = "ar"
RESAMPLES = 10_000
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
PASS_LIMITS = (1, 2, 3, 4, 8)
_OF_POINTS = ("n", "accuracy", "retention", "tokens_per_nfe", "tokens_per_s", "speed_ratio")
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Interval = tuple[float, float]


def summarise(items: Sequence[Item], modes: Sequence[str], seed: int) -> dict[str, Any]:
    """`modes` (all items) and `categories` of the record; see docs/evaluation.md."""
    categories = dict.fromkeys(item.document.category for item in items)
    return {
        "modes": measure(items, modes, seed),
        "categories": {
            category: measure([i for i in items if i.document.category == category], modes, seed)
            for category in categories
        },
    }


def measure(items: Sequence[Item], modes: Sequence[str], seed: int) -> dict[str, Any]:
    """Accuracy, retention and cost of each mode on these items; null where ar was not run."""
    answers = {mode: [item.answers[mode] for item in items] for mode in modes}
    correct = np.array([[one.correct for one in own] for own in answers.values()], float)
    means = resample_means(correct, seed)
    accuracies = correct.mean(axis=1)
    baseline, ar = (modes.index(BASELINE), answers[BASELINE]) if BASELINE in modes else (-1, None)
    record: dict[str, Any] = {}
    for place, (mode, own) in enumerate(answers.items()):
        kept: float | None = None
        kept_interval: Interval = (math.nan, math.nan)
        if ar is not None and accuracies[baseline] > 0:
            kept = float(accuracies[place] / accuracies[baseline])
            kept_interval = interval(retention(means, place, baseline))
        same = None if ar is None else sum(a.text == b.text for a, b in zip(own, ar, strict=True))
        record[mode] = {
            "accuracy": float(accuracies[place]),
            "interval": _plain(interval(means[:, place])),
            "retention": kept,
            "retention_interval": _plain(kept_interval),
            "n": len(items),
            "correct": int(correct[place].sum()),
            "same_as_ar": same,
            **_costs(own),
            **_speed_ratio(own, ar or ()),
        }
    return record


def _costs(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens, passes and seconds of a mode, summed over items."""
    tokens, nfe = sum(a.tokens for a in answers), sum(a.nfe for a in answers)
    seconds = sum(a.seconds for a in answers)
    return {
        "tokens": tokens,
        "nfe": nfe,
        "tokens_per_nfe": tokens / nfe if nfe else None,
        "context_forwards": sum(a.context_forwards for a in answers),
        "tokens_per_forward": _per_forward(answers),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "degenerate": sum(a.degenerate for a in answers),
    }


def _per_forward(answers: Sequence[Answer]) -> float | None:
    """Tokens that a context forward yields after the prompt's: 1 for ar, else acceptance length."""
    forwards = sum(a.context_forwards - 1 for a in answers)
    return sum(a.tokens - 1 for a in answers) / forwards if forwards > 0 else None


def _speed_ratio(own: Sequence[Answer], ar: Sequence[Answer]) -> dict[str, Any]:
    """Seconds per token of ar over the mode's: median and quartiles over pairs on one prompt."""
    ratios = [
        (b.seconds / b.tokens) / (a.seconds / a.tokens)
        for a, b in zip(own, ar, strict=False)  # ar may not have been run
        if a.tokens and b.tokens
    ]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [None] * 3
    return {"speed_ratio": middle, "speed_ratio_quartiles": [low, high]}


def summarise_traces(traces: Mapping[str, Trace]) -> dict[str, Any]:
    """Mean passes by block number, mean commit step by position, and how far left to right."""
    return {mode: _trace(trace) for mode, trace in traces.items() if trace.steps}


def _trace(trace: Trace) -> dict[str, Any]:
    numbers = range(max(number for number, _ in trace.steps) + 1)
    by_block = [[passes for at, passes in trace.steps if at == number] for number in numbers]
    size = max(len(block) for block in trace.commits)
    steps = [[block[at] for block in trace.commits if at < len(block)] for at in range(size)]
    taus = [tau for block in trace.commits if (tau := kendall_tau(block)) is not None]
    return {
        "steps_by_block": [sum(passes) / len(passes) for passes in by_block if passes],
        "blocks": [len(passes) for passes in by_block if passes],
        "commit_step_by_position": [sum(passes) / len(passes) for passes in steps],
        "kendall_tau": sum(taus) / len(taus) if taus else None,
    }


def kendall_tau(steps: Sequence[int]) -> float | None:
    """Agreement of commit order with position, ties left out: 1 is left to right, None no order."""
    signs = [
        1 if steps[j] > steps[i] else -1
        for i in range(len(steps))
        for j in range(i + 1, len(steps))
        if steps[i] != steps[j]
    ]
    return sum(signs) / len(signs) if signs else None


def _plain(bounds: Interval) -> list[float | None]:
    return [None if math.isnan(bound) else bound for bound in bounds]


def resample_means(correct: Array, seed: int) -> Array:
    """Accuracies of every mode in resampled sets of items: correct (modes, n) -> (10000, modes).

    All modes of a resample share its items: their differences keep the pairing. Items on which all
    modes fare alike are interchangeable, so that only the count of each such kind is drawn.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    n = correct.shape[1]
    kinds, counts = np.unique(correct, axis=1, return_counts=True)  # (modes, kinds)
    chosen = generator.multinomial(n, counts / n, size=RESAMPLES)
    means: Array = chosen @ kinds.T / n
    return means


def interval(values: Array) -> Interval:
    """The central 95 % of resampled values, without those that are not finite."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return (float("nan"), float("nan"))
    low, high = np.quantile(finite, [0.025, 0.975])
    return (float(low), float(high))


def retention(means: Array, mode: int, baseline: int) -> Array:
    """Resampled accuracies of one mode over those of the baseline; nan where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = np.where(means[:, baseline] > 0, means[:, mode] / means[:, baseline], np.nan)
    return ratio


def settings(subject: Subject) -> list[GenerateOptions]:
    """The points of the sweep: each threshold without a limit, each limit at the base threshold."""
    base = subject.options["diffusion"]
    known = resolve_options(base, defaults_of(subject.model))
    base = dataclasses.replace(base, confidence_threshold=known.confidence_threshold)
    points = [
        dataclasses.replace(base, confidence_threshold=threshold, steps_per_block=known.block_size)
        for threshold in THRESHOLDS
    ]
    points += [
        dataclasses.replace(base, steps_per_block=limit)
        for limit in PASS_LIMITS
        if limit < known.block_size  # as many passes as positions limit nothing
    ]
    return points


def sweep(
    subject: Subject, groups: Sequence[Sequence[Document]], judge: Judge, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield one record per setting of `subject.options["diffusion"]`, each paired with ar."""
    for point in settings(subject):
        chosen = {"ar": subject.options["ar"], "diffusion": point}
        pair = Subject(model=subject.model, tokenizer=subject.tokenizer, options=chosen)
        traces = {mode: Trace() for mode in chosen}
        measured = measure(list(evaluate(pair, groups, traces, judge)), list(chosen), seed)
        known = resolve_options(point, defaults_of(subject.model))
        limited = known.steps_per_block < known.block_size
        yield {
            "mode": "diffusion",
            "confidence_threshold": point.confidence_threshold,
            "steps_per_block": known.steps_per_block if limited else None,
            "ar_accuracy": measured["ar"]["accuracy"],
            **{name: measured["diffusion"][name] for name in _OF_POINTS},
        }
