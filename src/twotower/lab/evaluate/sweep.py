"""Quality against speed of diffusion decoding as its threshold and its pass limit vary."""

import dataclasses
from collections.abc import Iterator, Sequence

from twotower.engine import GenerateOptions, defaults_of, resolve_options
from twotower.lab.corpus import Document
from twotower.lab.evaluate.results import measure
from twotower.lab.evaluate.run import Subject, Trace, evaluate
from twotower.lab.evaluate.suite import Judge

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
PASS_LIMITS = (1, 2, 3, 4, 8)


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
) -> Iterator[dict[str, object]]:
    """Yield one record per setting of `subject.options["diffusion"]`, each paired with ar."""
    for point in settings(subject):
        chosen = {"ar": subject.options["ar"], "diffusion": point}
        pair = Subject(model=subject.model, tokenizer=subject.tokenizer, options=chosen)
        traces = {mode: Trace() for mode in chosen}
        measured = measure(list(evaluate(pair, groups, traces, judge)), list(chosen), seed)
        found, baseline = measured["diffusion"], measured["ar"]
        assert isinstance(found, dict) and isinstance(baseline, dict)
        known = resolve_options(point, defaults_of(subject.model))
        limited = known.steps_per_block < known.block_size
        yield {
            "mode": "diffusion",
            "confidence_threshold": point.confidence_threshold,
            "steps_per_block": known.steps_per_block if limited else None,
            "ar_accuracy": baseline["accuracy"],
            **{
                name: found[name]
                for name in (
                    "n", "accuracy", "retention", "tokens_per_nfe", "tokens_per_s", "speed_ratio",
                )
            },
        }  # fmt: skip
