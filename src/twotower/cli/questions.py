"""Questions for a model that is adapted or benchmarked: from files, in its chat template."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from twotower.arguments import require_unicode
from twotower.cli.output_file import read_lines
from twotower.cli.prompts import Prompt, is_jsonl, line_text, parse_line
from twotower.cli.serve import need_extra
from twotower.engine.fork_server import Process
from twotower.engine.request import known_ids
from twotower.loading import Loaded

_FIELDS = ("prompt", "question", "instruction", "text", "turns", "messages", "conversations")
_TABLES = (".json", ".csv", ".tsv", ".parquet")  # files of data whose lines are no prompts
Encode = Callable[[Prompt, str], list[int]]  # a prompt, and where it lies
_MAX_TOKENS = 2**20  # of a prompt: longer ones are left out later


@dataclass(frozen=True, kw_only=True)
class Question:
    """Text or token ids, the name of the file that has it, and where it lies, for messages."""

    text: Prompt
    task: str
    where: str


def read_questions(files: Sequence[Path], most: int | None = None) -> list[Question]:
    """The first `most` questions of each file: .jsonl has one object a line, any other file one
    question a line. ValueError (one line) for a file that cannot be read or is a table, a line that
    is no question, and for none at all.
    """
    found: list[Question] = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"prompts: there is no file {file}")
        if file.suffix.lower() in _TABLES:
            raise ValueError(
                f"prompts: {file} is not a file of one prompt a line; write it as .jsonl, with one "
                f"object a line that has one of {', '.join(_FIELDS)}"
            )
        found += islice(_questions(file), most)
    if not found:
        raise ValueError(f"prompts: {', '.join(map(str, files))} hold no prompt; add some")
    return found


def _questions(file: Path) -> Iterator[Question]:
    for line in read_lines(file):
        where = f"prompts: {file} line {line.number}"
        is_object = is_jsonl(file)
        prompt = _of_object(parse_line(line, where), where) if is_object else line_text(line, where)
        yield Question(text=prompt, task=file.stem, where=where)


def _of_object(record: object, where: str) -> Prompt:
    """What a record asks: the first of a list of turns, or of a user's messages; an instruction
    with its input below it.
    """
    record = record if isinstance(record, dict) else {}
    values = [record[key] for key in _FIELDS if record.get(key) is not None]
    found: Any = next(filter(None, values), values[0] if values else None)
    if isinstance(found, list):
        found = next(filter(None, map(_of_user, found)), found)
    is_ids = isinstance(found, list) and all(type(token) is int for token in found)
    if not is_ids and not isinstance(found, str):
        names = ", ".join(_FIELDS)
        raise ValueError(f"{where} has none of {names} that is text or token ids; add one")
    more = record.get("input") if found and found is record.get("instruction") else None
    if isinstance(more, str) and more.strip():
        found = f"{found}\n\n{more}"
    prompt: Prompt = found if is_ids else require_unicode(found, where)
    return prompt


def _of_user(turn: object) -> object:
    """The text of a turn, if it is the user's: text itself, or a message of OpenAI's form, or of
    ShareGPT's.
    """
    if isinstance(turn, dict):
        is_user = turn.get("role", turn.get("from")) in ("user", "human")
        found = turn.get("content", turn.get("value")) if is_user else None
        return found if isinstance(found, str) else None
    return turn if isinstance(turn, str) else None


def question_encoder(loaded: Loaded, verb: str, is_plain: bool) -> Encode:
    """How a question becomes token ids: as a user's message, where the model has a chat template
    and is_plain does not leave it out. A blank one has no ids. ValueError (one line) for ids
    outside the vocabulary.
    """
    tokenizer = loaded.need_tokenizer()
    template = None
    if not is_plain:
        with need_extra(verb):
            from twotower.serve.chat import read_template
            from twotower.serve.errors import ApiError

        template = read_template(loaded.folder)
    processes: list[Process] = []  # one for all: a fork takes longer than a prompt

    def encode(text: Prompt, where: str) -> list[int]:
        if not text or (isinstance(text, str) and not text.strip()):
            return []
        if not isinstance(text, str):
            return known_ids(loaded.model, where, text)
        if template is None:
            return tokenizer.encode_prompt(text)
        messages = [{"role": "user", "content": text}]
        try:
            if not processes:
                processes.append(template.process(tokenizer))
            return template.encode(messages, None, tokenizer, _MAX_TOKENS, processes[0])
        except ApiError as error:
            raise ValueError(str(error)) from None

    return encode


def tell_left_out(num_kept: int, total: int, reasons: str) -> None:
    """Say on stderr how many prompts are left out, if any."""
    if num_kept < total:
        print(f"{total - num_kept} of {total} prompts are left out: {reasons}", file=sys.stderr)
