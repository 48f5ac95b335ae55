"""The backbone's own answers: what it would write is what its denoiser must learn to draft."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.adapt.options import AnswerOptions
from twotower.engine import (
    EngineOptions,
    Failed,
    Finished,
    GenerateOptions,
    Request,
    stream_requests,
)
from twotower.model import TwoTower


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


def read_answers(file: Path) -> list[Answer]:
    """The whole lines of a file; a line that a killed run left half is none. ValueError (one line)
    for what is no answer.
    """
    if not file.is_file():
        return []
    with file.open("rb") as lines:
        whole = [line for line in lines if line.endswith(b"\n")]
    return [_read_answer(line, f"{file}:{number}") for number, line in enumerate(whole, 1)]


def write_answers(
    model: TwoTower,
    questions: Sequence[Question],
    file: Path,
    options: AnswerOptions,
    seconds: float,
) -> Iterator[Answer]:
    """Answer questions that the file has no answer to, in order, until the time is over; each is on
    the disk when it is yielded.
    """
    done = {answer.number for answer in read_answers(file)}
    open_ones = [question for question in questions if question.number not in done]
    deadline = time.monotonic() + seconds
    decoding = GenerateOptions(
        mode="ar", max_new_tokens=options.max_tokens, temperature=options.temperature
    )

    def requests() -> Iterator[Request]:
        for question in open_ones:
            if time.monotonic() > deadline:
                return
            yield Request(question.prompt, decoding)

    _drop_half_line(file)
    with file.open("ab") as lines:
        engine = EngineOptions(batch_size=options.batch_size)
        for event in stream_requests(model, requests(), None, engine):
            if isinstance(event, Failed):
                raise ValueError(f"answer {open_ones[event.row].number}: {event.message}")
            if isinstance(event, Finished):
                question = open_ones[event.row]
                answer = Answer(
                    number=question.number,
                    task=question.task,
                    prompt=question.prompt,
                    tokens=event.completion.tokens,
                )
                lines.write(json.dumps(vars(answer)).encode() + b"\n")
                lines.flush()
                yield answer
            if time.monotonic() > deadline:
                return


def _read_answer(line: bytes, place: str) -> Answer:
    try:
        found = Answer(**json.loads(line))
        ids = [*found.prompt, *found.tokens]
        if not all(isinstance(i, int) and i >= 0 for i in (found.number + 2**63, *ids)):
            raise ValueError
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            f"{place}: is not an answer that adapt wrote; remove the line, or give another --work"
        ) from None
    return found


def _drop_half_line(file: Path) -> None:
    """Cut what a killed run left behind the last whole line."""
    if file.is_file():
        content = file.read_bytes()
        os.truncate(file, content.rfind(b"\n") + 1)
