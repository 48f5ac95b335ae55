"""Decode the suite in every mode, judge each answer, and add it all up.

Modes take turns on every group of prompts, in rotating order, so that a slow moment of the machine
falls on all of them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from twotower.engine import GenerateOptions
from twotower.lab.corpus import Document
from twotower.lab.evaluate.decode import Output, Trace, decode
from twotower.lab.evaluate.suite import Verdict, check, held_out
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One mode's answer to one item."""

    output: Output
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt with every mode's answer; `index` counts within its category."""

    document: Document
    index: int
    prompt_tokens: int
    answers: Mapping[str, Judged]

    def to_dict(self) -> dict[str, object]:
        """JSON-able: prompt, reference and, by mode, text, verdict and costs."""
        return {
            "category": self.document.category,
            "index": self.index,
            "prompt": self.document.prompt,
            "prompt_tokens": self.prompt_tokens,
            "reference": self.document.completion,
            "outputs": {
                mode: {**asdict(judged.output), **asdict(judged.verdict)}
                for mode, judged in self.answers.items()
            },
        }


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: a model and the options of each mode by its name."""

    model: TwoTower
    tokenizer: Tokenizer
    options: Mapping[str, GenerateOptions]


def evaluate(
    subject: Subject,
    groups: Sequence[Sequence[Document]],
    traces: Mapping[str, Trace],
) -> Iterator[Item]:
    """Yield each document's item once all modes have answered its group, in order."""
    modes = list(subject.options)
    seen: Counter[str] = Counter()
    for turn, group in enumerate(groups):
        prompts = [document.prompt for document in group]
        outputs: dict[str, list[Output]] = {}
        for place in range(len(modes)):
            mode = modes[(turn + place) % len(modes)]
            outputs[mode] = decode(
                subject.model, subject.tokenizer, prompts, subject.options[mode], traces[mode]
            )
        for place, document in enumerate(group):
            answers = {
                mode: Judged(
                    output=outputs[mode][place],
                    verdict=check(document, outputs[mode][place].text),
                )
                for mode in modes
            }
            yield Item(
                document=document,
                index=seen[document.category],
                prompt_tokens=len(subject.tokenizer.encode(document.prompt)),
                answers=answers,
            )
            seen[document.category] += 1


def draw_groups(
    categories: Sequence[str], items: int, seed: int, batch_size: int
) -> list[list[Document]]:
    """The suite's documents in groups of one category, whose time is then that category's own.

    Categories take turns, so that a cut run has seen all of them alike.
    """
    columns = [held_out(category, items, seed) for category in categories]
    starts = range(0, items, batch_size)
    return [column[start : start + batch_size] for start in starts for column in columns]


def warm_up(subject: Subject, document: Document) -> None:
    """Decode once in every mode, untimed: first calls pay for what later ones reuse."""
    for options in subject.options.values():
        decode(subject.model, subject.tokenizer, [document.prompt], options, Trace())
