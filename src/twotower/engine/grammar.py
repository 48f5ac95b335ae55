"""What a text must match, token by token: a JSON schema, tool calls, a regex or a Lark grammar.

A `Grammar` is a rule for whole texts. The library that knows what it allows is llguidance; whether
it can keep a grammar is known when a request meets a tokenizer (`grammar_builder`). What is larger
than any that is meant is refused here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from twotower.engine.grammar_schema import ready_schema

GrammarKind = Literal["json_schema", "tool_call", "regex", "lark"]
_LONGEST_REASON = 300  # characters of the library's explanation
# Between the parts of a JSON text: a space, or a new line and its indent. With more, a model that
# has nothing to say writes spaces until its length is used up.
_WHITESPACE = r"( |\n[ \t]{0,32})"
_MAX_CHARS = 256 << 10  # of a grammar
_MAX_PATTERN_CHARS = 32 << 10  # of a regex or Lark grammar


class GrammarFailed(Exception):
    """A row's text cannot go on under its grammar.

    is_of_grammar: the library says so of the grammar itself, mostly that following it exceeds its
    bounds: the fault of whoever wrote it.
    """

    def __init__(self, message: str, is_of_grammar: bool = False) -> None:
        super().__init__(message)
        self.is_of_grammar = is_of_grammar


@dataclass(frozen=True)
class Grammar:
    """A rule for whole texts; made by `json_schema`, `regex`, `lark`, or `tool_calls.tool_call`.

    Whether it can be kept is known when a request meets a tokenizer: a bad one is a ValueError
    (one line) there.
    """

    kind: GrammarKind
    source: str  # as llguidance reads it

    def __post_init__(self) -> None:
        most = _MAX_PATTERN_CHARS if self.kind in ("regex", "lark") else _MAX_CHARS
        if len(self.source) > most:
            raise ValueError(
                f"{self.kind}: has {len(self.source)} characters; at most {most} are allowed"
            )


def json_schema(schema: Mapping[str, object] | bool | str, is_strict: bool = True) -> Grammar:
    """A JSON value that the schema (an object, or its text) accepts, after at most one space.

    Objects have no keys but those that the schema names, unless it has `additionalProperties`.
    is_strict: keywords that cannot be kept are refused; otherwise they are passed over.
    """
    start = {"name": "start", "lark_grammar": 'start: " "? @value'}
    rules = [start, schema_rule("value", schema, "json_schema", is_strict)]
    return Grammar("json_schema", json.dumps({"grammars": rules}))


def regex(pattern: str) -> Grammar:
    """A text that the whole pattern matches; no look-around, as in Rust's `regex`."""
    return Grammar("regex", pattern)


def lark(text: str) -> Grammar:
    """A text of the rule `start` of a Lark grammar."""
    return Grammar("lark", text)


def schema_rule(
    name: str, schema: Mapping[str, object] | bool | str, field: str, is_strict: bool = True
) -> dict[str, object]:
    """A rule for llguidance whose references are the schema's own; ValueError names `field`, and so
    does the refusal of what cannot be kept.
    """
    value = ready_schema(schema, field)
    if value is not False:
        own = value if isinstance(value, dict) else {}
        lenient = {"lenient": not is_strict, "coerce_one_of": not is_strict}
        value = {**own, "x-guidance": {**lenient, "whitespace_pattern": _WHITESPACE}}
    return {"name": name, "json_schema": value, "field": field}


def one_line(message: str) -> str:
    """What the library says, for one line of ours."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    if " " not in line:  # its name for that, such as NoExtensionBias
        line = f"no token can follow this text ({line})"
    return shortened(line)


def shortened(line: str) -> str:
    """No more of it than anyone reads."""
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
