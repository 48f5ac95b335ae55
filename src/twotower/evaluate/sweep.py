"""Quality against speed of diffusion decoding as its threshold and its pass limit vary."""

from collections.abc import Iterator, Sequence

from twotower.corpus import Document
from twotower.engine import GenerateOptions
from twotower.evaluate.decode import Trace
from twotower.evaluate.results import measure
from twotower.evaluate.run import Subject, evaluate

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
PASS_LIMITS = (1, 2, 3, 4, 8)


def settings(base: GenerateOptions) -> list[GenerateOptions]:
    """The points of the sweep: each threshold without a limit, each limit at the base threshold."""
    points = [
        GenerateOptions(
            mode=base.mode, max_new_tokens=base.max_new_tokens, confidence_threshold=threshold
        )
        for threshold in THRESHOLDS
    ]
    points += [
        GenerateOptions(
            mode=base.mode,
            max_new_tokens=base.max_new_tokens,
            confidence_threshold=base.confidence_threshold,
            steps_per_block=limit,
        )
        for limit in PASS_LIMITS
    ]
    return points


def sweep(
    subject: Subject, documents: Sequence[Document], batch_size: int, seed: int
) -> Iterator[dict[str, object]]:
    """Yield one record per setting of `subject.options["diffusion"]`, each paired with ar."""
    for point in settings(subject.options["diffusion"]):
        chosen = {"ar": subject.options["ar"], "diffusion": point}
        pair = Subject(model=subject.model, tokenizer=subject.tokenizer, options=chosen)
        traces = {mode: Trace() for mode in chosen}
        items = list(evaluate(pair, documents, batch_size, traces))
        found = measure(items, list(chosen), seed)["diffusion"]
        assert isinstance(found, dict)
        limited = "steps_per_block" in point.given  # type: ignore[attr-defined]  # set by __new__
        yield {
            "mode": "diffusion",
            "confidence_threshold": point.confidence_threshold,
            "steps_per_block": point.steps_per_block if limited else None,
            **{
                name: found[name]
                for name in (
                    "n", "accuracy", "retention", "tokens_per_nfe", "tokens_per_s", "speed_ratio",
                )
            },
        }  # fmt: skip
