"""What the ablation scripts share: judge settings on the suite's items, and record the outcome.

A record keeps the verdict on every item, so that two records can be compared item by item.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twotower.engine import GenerateOptions
from twotower.lab.corpus import Document
from twotower.lab.evaluate.likelihood import bound_text
from twotower.lab.evaluate.results import interval, resample_means, summarise
from twotower.lab.evaluate.run import Item, Subject, Trace, evaluate
from twotower.lab.evaluate.sandbox import find_sandbox
from twotower.lab.evaluate.suite import make_judge

RESULTS = Path("benchmarks/results/ablations")
Record = dict[str, Any]
KEPT = ("accuracy", "interval", "retention", "n", "tokens_per_nfe")  # by category


def judge(
    model: Any,
    tokenizer: Any,
    settings: Mapping[str, GenerateOptions],
    groups: Sequence[Sequence[Document]],
) -> Iterator[Item]:
    """Every document's item with an answer per setting; a group is decoded together."""
    subject = Subject(model=model, tokenizer=tokenizer, options=settings)
    traces = {name: Trace() for name in settings}
    return evaluate(subject, groups, traces, make_judge(find_sandbox()))


def merge(first: Sequence[Item], second: Sequence[Item]) -> list[Item]:
    """Items with the answers of both; the documents must be the same, in the same order."""
    return [
        replace(a, answers={**a.answers, **b.answers}) for a, b in zip(first, second, strict=True)
    ]


def to_record(items: Sequence[Item], seed: int) -> Record:
    """The suite's summary against "ar", and a string of 0 and 1 per setting and category."""
    names = list(items[0].answers)
    verdicts: dict[str, dict[str, str]] = {name: {} for name in names}
    for item in items:
        category = item.document.category
        for name in names:
            mark = str(int(item.answers[name].correct))
            verdicts[name][category] = verdicts[name].get(category, "") + mark
    found: Record = summarise(items, names, seed)
    found["categories"] = {
        category: {name: {key: row[key] for key in KEPT} for name, row in measured.items()}
        for category, measured in found["categories"].items()
    }
    return {**found, "verdicts": verdicts}


def answer_bounds(
    model: Any, tokenizer: Any, documents: Sequence[Document], align: int, samples: int, seed: int
) -> Iterator[float]:
    """Nats of each reference answer under the denoiser (an upper bound).

    An answer is filled up with EOS to a multiple of `align`, as in training, so that it is the
    same text for every block size.
    """
    for number, document in enumerate(documents):
        text = tokenizer.encode(document.completion)
        text += [tokenizer.eos_id] * (align - len(text) % align)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        prompt = tokenizer.encode(document.prompt, add_bos=True)
        yield bound_text(model, prompt, text, samples, generator).nats


def write(record: Record, file: Path) -> None:
    """Write aside, then rename: a file that exists is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def verdict_vector(verdicts: Mapping[str, str], categories: Sequence[str]) -> np.ndarray:
    """0 or 1 per item of some categories, in their order."""
    return np.array([int(mark) for category in categories for mark in verdicts[category]], float)


def compare(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Difference of two means over the same items, and its 95 % interval (paired bootstrap)."""
    means = resample_means(np.stack([ours, theirs]), seed=0)
    return float(ours.mean() - theirs.mean()), interval(means[:, 0] - means[:, 1])
