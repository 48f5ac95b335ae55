"""Where prompts, and grammars for their answers, come from: arguments, a file, or stdin."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from twotower.arguments import require_unicode
from twotower.cli.output_file import MAX_LINE_BYTES, InputLine, read_lines
from twotower.engine.grammar import Grammar, json_schema, lark, regex

Prompt = str | list[int]
STDIN = "-"
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_TOO_LONG = f"is longer than {MAX_LINE_BYTES >> 20} MiB; give a shorter prompt"


def read_prompts(
    arguments: Sequence[str], file: Path | None, is_escaped: bool = False
) -> list[Prompt]:
    """Prompts in order: the arguments ("-" reads stdin), then the file's, else stdin's.

    A .jsonl file holds one object a line, {"prompt": text or list of token ids}; any other file,
    and stdin, is one prompt whose last line break is dropped. is_escaped: arguments spell line
    breaks, tabs and backslashes as C does. ValueError (one line) for none at all, for
    what cannot be read, and for text that is not UTF-8.
    """
    if list(arguments).count(STDIN) > 1:
        raise ValueError("'-' is given twice; stdin can be read only once")
    prompts: list[Prompt] = [
        _read_stdin()
        if argument == STDIN
        else read_argument(argument, f"prompt {number}", is_escaped)
        for number, argument in enumerate(arguments)
    ]
    if file is not None:
        prompts += _read_file(file)
    if not prompts:
        if sys.stdin.isatty():
            raise ValueError("no prompt; give one as an argument, with --input FILE, or on stdin")
        prompts.append(_read_stdin())
    return prompts


def read_argument(text: str, name: str, is_escaped: bool) -> str:
    """A text of the command line; one that seems to spell line breaks is named on stderr."""
    require_unicode(text, name)
    if is_escaped:
        return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], text)
    if r"\n" in text and "\n" not in text:
        print(
            rf"note: {name} has \n as two characters; with --escape it is a line break",
            file=sys.stderr,
        )
    return text


def is_jsonl(file: Path) -> bool:
    """Whether a file is of one object a line, by its name's ending in any letters."""
    return file.suffix.lower() == ".jsonl"


def _read_stdin() -> str:
    return decoded(_bounded(sys.stdin.buffer, "stdin"), "stdin").removesuffix("\n")


def _read_file(file: Path) -> list[Prompt]:
    if not is_jsonl(file):
        try:
            with file.open("rb") as stream:
                content = _bounded(stream, f"input: {file}")
        except OSError as error:
            raise ValueError(f"input: cannot read {file} ({error.strerror})") from None
        return [decoded(content, f"input: {file}").removesuffix("\n")]
    lines = []
    for line in read_lines(file):
        where = f"input: {file} line {line.number}"
        lines.append(parse_prompt(parse_line(line, where), where))
    if not lines:
        raise ValueError(f"input: {file} holds no prompt; write one object a line")
    return lines


def _bounded(stream: BinaryIO, where: str) -> bytes:
    """All of it, unless it is longer than a prompt may be."""
    content = stream.read(MAX_LINE_BYTES + 1)
    if len(content) > MAX_LINE_BYTES:
        raise ValueError(f"{where} {_TOO_LONG}")
    return content


def line_text(line: InputLine, where: str) -> str:
    """What a line says; ValueError (one line, which begins with `where`) if it cannot be read."""
    if line.content is None:
        raise ValueError(f"{where} {_TOO_LONG}")
    return decoded(line.content, where).strip()


def parse_line(line: InputLine, where: str) -> object:
    """The JSON value of a line; ValueError likewise."""
    text = line_text(line, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); write one object a line") from None


def parse_prompt(record: object, where: str) -> Prompt:
    """The prompt of a line's object; ValueError (one line, which begins with `where`)."""
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if isinstance(prompt, str):
        return require_unicode(prompt, where)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise ValueError(f'{where} has no "prompt" that is text or a list of token ids; add one')


def decoded(content: bytes, where: str) -> str:
    """Bytes as text, without a byte order mark; ValueError, which begins with `where`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start}); convert it") from None


def read_grammar(file: Path) -> Grammar:
    """The grammar in a file, by the end of its name."""
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(MAX_LINE_BYTES)  # of which a grammar may have a part
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"grammar: cannot read {file} ({reason}); name a text file") from None
    ending = file.suffix.lower()
    if ending == ".json":
        return json_schema(text)
    return lark(text) if ending == ".lark" else regex(text.removesuffix("\n"))
