"""Decode the suite in every mode and judge each answer.

Modes take turns on every group of prompts, in rotating order, so that a slow moment of the machine
falls on all of them.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from twotower.engine import Finished, GenerateOptions, StepTaken, stream
from twotower.lab.corpus import Document
from twotower.lab.evaluate.suite import Judge, held_out
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

AUTO = "auto"
REPEATS, REPEATED_TOKENS, LONGEST_LOOP = 4, 16, 16


def split_names(text: str) -> tuple[str, ...]:
    """The names of a comma-separated list, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def check_names(field: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    """ValueError (one line) unless some names are given and all are known."""
    if not given:
        raise ValueError(f"{field}: none given; use some of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise ValueError(f"{field}: {name!r} is unknown; use some of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a mode wrote, the verdict once known; `seconds` is its share of the group's time."""

    text: str
    tokens: int
    nfe: int
    context_forwards: int
    seconds: float
    degenerate: bool
    correct: bool = False
    reason: str = ""


@dataclass(kw_only=True)
class Trace:
    """How blocks were filled: passes of every block by its number, commit steps by position."""

    steps: list[tuple[int, int]] = field(default_factory=list)  # block number, passes
    commits: list[list[int]] = field(default_factory=list)  # per block: step of each position


def decode(
    model: TwoTower,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: GenerateOptions,
    trace: Trace,
) -> list[Answer]:
    """Decode prompts together and time it as a whole, prefill included."""
    steps: list[StepTaken] = []
    finished: dict[int, Finished] = {}
    begin = time.perf_counter()
    for event in stream(model, prompts, options, tokenizer):
        if isinstance(event, StepTaken):
            steps.append(event)
        elif isinstance(event, Finished):
            finished[event.row] = event
    seconds = (time.perf_counter() - begin) / len(prompts)
    record_steps(steps, trace)
    outputs = []
    for row in range(len(prompts)):
        done = finished[row].completion
        outputs.append(
            Answer(
                text=done.text or "",
                tokens=len(done.tokens),
                nfe=done.nfe,
                context_forwards=done.context_forwards,
                seconds=seconds,
                degenerate=done.finish_reason == "length" and is_loop(done.tokens),
            )
        )
    return outputs


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether a text ends in one sequence of up to 16 tokens, at least four times in a row.

    Sequences of one to three tokens must fill 16 tokens: "000" is a number, not a loop.
    """
    for length in range(1, LONGEST_LOOP + 1):
        count = max(REPEATS, -(-REPEATED_TOKENS // length))
        tail = tokens[-length * count :]
        if len(tail) == length * count and all(
            tail[i] == tail[i + length] for i in range(len(tail) - length)
        ):
            return True
    return False


def record_steps(steps: Sequence[StepTaken], trace: Trace) -> None:
    """Add to the trace what the steps of a group show: `StepTaken.is_masked` after each step."""
    blocks: dict[tuple[int, int], list[StepTaken]] = {}
    for step in steps:
        blocks.setdefault((step.row, step.block_index), []).append(step)
    for (_, block), taken in blocks.items():
        trace.steps.append((block, len(taken)))
        first_open = [
            sum(step.is_masked[position] for step in taken) + 1
            for position in range(len(taken[0].is_masked))
        ]
        trace.commits.append(first_open)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt with every mode's answer; `index` counts within its category."""

    document: Document
    index: int
    prompt_tokens: int
    answers: Mapping[str, Answer]

    def to_dict(self) -> dict[str, object]:
        """JSON-able: prompt, reference and, by mode, text, verdict and costs."""
        return {
            "category": self.document.category,
            "index": self.index,
            "prompt": self.document.prompt,
            "prompt_tokens": self.prompt_tokens,
            "reference": self.document.completion,
            "outputs": {mode: asdict(answer) for mode, answer in self.answers.items()},
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
    judge: Judge,
) -> Iterator[Item]:
    """Yield each document's item once all modes have answered its group, in order."""
    modes = list(subject.options)
    seen: Counter[str] = Counter()
    for turn, group in enumerate(groups):
        prompts = [document.prompt for document in group]
        outputs: dict[str, list[Answer]] = {}
        for place in range(len(modes)):
            mode = modes[(turn + place) % len(modes)]
            outputs[mode] = decode(
                subject.model, subject.tokenizer, prompts, subject.options[mode], traces[mode]
            )
        for place, document in enumerate(group):
            answers = {mode: outputs[mode][place] for mode in modes}
            yield Item(
                document=document,
                index=seen[document.category],
                prompt_tokens=len(subject.tokenizer.encode(document.prompt)),
                answers={
                    mode: replace(answer, **vars(judge(document, answer.text)))
                    for mode, answer in answers.items()
                },
            )
            seen[document.category] += 1


def draw_groups(
    categories: Sequence[str], items: int, seed: int, batch_size: int
) -> list[list[Document]]:
    """The suite's documents in groups of one category; categories take turns, in case of a cut."""
    columns = [held_out(category, items, seed) for category in categories]
    starts = range(0, items, batch_size)
    return [column[start : start + batch_size] for start in starts for column in columns]


def warm_up(subject: Subject, document: Document) -> None:
    """Decode once in every mode, untimed: first calls pay for what later ones reuse."""
    for options in subject.options.values():
        decode(subject.model, subject.tokenizer, [document.prompt], options, Trace())
