"""Chat templates in processes of their own: the program that `chat.py` runs in a fork server.

A template is a program and runs in jinja2's sandbox, which forbids what it may touch and not what
it may take. What a caller wrote can never become a special token: its written form is covered
before rendering and uncovered afterwards, in pieces that are encoded as plain letters.
"""

import itertools
import json
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_CHARS = 64 << 20
COMPILE, RENDER = b"c", b"r"  # and behind the letter what `_compile` and `_render` take, as JSON


class Program:
    """What one process knows."""

    def __init__(self) -> None:
        self._template: Template | None = None
        self._variables: dict[str, str] = {}  # of the template's own
        self._special: list[str] = []

    def copy(self) -> "Program":
        """Rendering leaves nothing behind."""
        return self

    def answer(self, request: bytes) -> bytes:
        """Do what the first letter says. ValueError with a reason."""
        given = json.loads(request[1:])
        if request[:1] == COMPILE:
            self._compile(**given)
            return b""
        return json.dumps(self._render(**given)).encode()

    def _compile(self, source: str, variables: dict[str, str], special: list[str]) -> None:
        """special: the written forms of special tokens."""
        self._variables, self._special = variables, special
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ValueError(f"does not compile ({error})") from None

    def _render(self, context: dict[str, Any], most_pieces: int) -> list[tuple[str, bool]]:
        """Parts of the text in order, and whether special tokens in them are meant."""
        assert self._template is not None
        cover = _Cover(self._special)
        try:
            text = self._template.render(**self._variables, **cover.all(context))
        except TemplateError as error:
            raise ValueError(f"refuses them ({error})") from None
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"fails ({type(error).__name__}: {error})") from None
        # One more than allowed tells that there are too many: each is a token or more.
        return list(itertools.islice(cover.pieces(text[:_MAX_CHARS]), most_pieces + 1))


class _Generation(Extension):
    """generation blocks mark for training what the model itself wrote: they are their text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # a set there

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = time.strftime
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes <, > and quotes for HTML; the arguments are those of transformers.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


class _Cover:
    """Stand-ins for the written forms of special tokens in what a caller sent."""

    def __init__(self, texts: list[str]) -> None:
        nonce = secrets.token_hex(8)  # nobody can write a stand-in themselves
        self._stand_ins = {text: f"\ue000{nonce}.{n}\ue001" for n, text in enumerate(texts)}
        self._texts = {stand_in: text for text, stand_in in self._stand_ins.items()}
        longest_first = sorted(map(re.escape, texts), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or r"(?!)")
        self._covered = re.compile(f"(\ue000{nonce}\\.[0-9]+\ue001)")

    def all(self, value: Any) -> Any:
        """A copy of JSON-able data with every special token covered."""
        match value:
            case str():
                return self._special.sub(lambda found: self._stand_ins[found[0]], value)
            case dict():
                return {self.all(key): self.all(part) for key, part in value.items()}
            case list():
                return [self.all(part) for part in value]
            case _:
                return value

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Parts of a rendered text in order, and whether special tokens in it are meant."""
        for number, part in enumerate(self._covered.split(text)):
            if part:
                is_template = number % 2 == 0
                yield part if is_template else self._texts[part], is_template
