"""The backbone's own answers: what it would write is what its denoiser must learn to draft."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from twotower.adapt.files import reading, writing
from twotower.adapt.options import AnswerOptions
from twotower.engine import (
    EngineOptions,
    Failed,
    Finished,
    GenerateOptions,
    Request,
    TokensCommitted,
    stream_requests,
)
from twotower.model import ContextCache, TwoTower


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as token ids, by its place in the files, and the task that it is counted under."""

    number: int
    prompt: list[int]
    task: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt and what the backbone wrote after it: token ids."""

    number: int
    task: str
    prompt: list[int]
    tokens: list[int]


class Written(NamedTuple):
    """An answer, and what the passes that wrote it have left, good until the next one; None where
    that is not known.
    """

    answer: Answer
    context: ContextCache | None = None


def read_answers(file: Path) -> list[Answer]:
    """The whole lines of a file; a line that a killed run left half is none. ValueError (one line)
    for what is no answer.
    """
    if not file.is_file():
        return []
    with file.open("rb") as lines:
        whole = [line for line in lines if line.endswith(b"\n")]
    return [_read_answer(line, f"{file}:{number}") for number, line in enumerate(whole, 1)]


def unanswered(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Question]:
    """The questions that have no answer yet."""
    done = {tuple(answer.prompt) for answer in answers}
    return [question for question in questions if tuple(question.prompt) not in done]


def write_answers(
    model: TwoTower,
    questions: Sequence[Question],
    file: Path,
    options: AnswerOptions,
    seconds: float,
) -> Iterator[Written]:
    """Answer questions in order, until the time is over; each answer is on the disk when it is
    yielded. Those that are not finished then are kept from half of their greatest length on.
    """
    deadline = time.monotonic() + seconds
    decoding = GenerateOptions(
        mode="ar", max_new_tokens=options.max_new_tokens, temperature=options.temperature
    )
    # A backend that chooses tokens itself is faster if it tells of nothing else.
    keeps_context = not model.backend.chooses_tokens
    begun = dict[int, list[int]]()  # tokens of each row that is not finished

    def requests() -> Iterator[Request]:
        for question in questions:
            if time.monotonic() > deadline:
                return
            yield Request(question.prompt, decoding, keeps_context=keeps_context)

    def written(row: int, tokens: list[int]) -> Answer:
        answer = Answer(**vars(questions[row]), tokens=tokens)
        content = json.dumps(vars(answer)).encode() + b"\n"
        with writing(file):
            while content:  # a full disk takes a part first and refuses then
                content = content[lines.write(content) :]
        return answer

    _drop_half_line(file)
    with file.open("ab", buffering=0) as lines:
        engine = EngineOptions(batch_size=options.batch_size)
        for event in stream_requests(model, requests(), None, engine):
            if isinstance(event, Failed):
                raise ValueError(f"answer {questions[event.row].number}: {event.message}")
            if isinstance(event, TokensCommitted):
                begun.setdefault(event.row, []).extend(event.tokens)
            if isinstance(event, Finished):
                begun.pop(event.row, None)
                yield Written(written(event.row, event.completion.tokens), event.context)
            if time.monotonic() > deadline:
                break
        for row, tokens in begun.items():
            if len(tokens) >= options.max_new_tokens / 2:
                yield Written(written(row, tokens))


def _read_answer(line: bytes, place: str) -> Answer:
    with reading(place, "remove the line, or give another --work", "an answer that"):
        found = Answer(**json.loads(line))
        ids = [*found.prompt, *found.tokens]
        if not all(isinstance(i, int) and i >= 0 for i in (found.number + 2**63, *ids)):
            raise ValueError
        return found


def _drop_half_line(file: Path) -> None:
    """Cut what a killed run left behind the last whole line."""
    if file.is_file():
        content = file.read_bytes()
        os.truncate(file, content.rfind(b"\n") + 1)
