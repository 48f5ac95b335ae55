"""What a text must match, token by token: a JSON schema, tool calls, a regex or a Lark grammar.

A `Grammar` is a rule for whole texts. The library that knows what it allows is llguidance; whether
it can keep a grammar is known when a request meets a tokenizer (`grammar_builder`). What is larger
than any that is meant is refused here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_schema", "tool_call", "regex", "lark"]
_LONGEST_REASON = 300  # characters of the library's explanation
# Between the parts of a JSON text: a space, or a new line and its indent. With more, a model that
# has nothing to say writes spaces until its length is used up.
_WHITESPACE = r"( |\n[ \t]{0,32})"
_MOST_CHARS = 256 << 10  # of a grammar
_MOST_PATTERN_CHARS = 32 << 10  # of a regex or Lark grammar
_MOST_DEPTH = 100  # of objects and lists in a schema
_MOST_PARTS = 20_000  # values in a schema
_MOST_REFERENCES = 1_000  # in a schema
_MOST_STRING = 2_000  # characters of a name, a constant, a pattern


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
        most = _MOST_PATTERN_CHARS if self.kind in ("regex", "lark") else _MOST_CHARS
        if len(self.source) > most:
            raise ValueError(
                f"{self.kind}: has {len(self.source)} characters; at most {most} are allowed"
            )


def json_schema(schema: Mapping[str, object] | bool | str) -> Grammar:
    """A JSON value that the schema (an object, or its text) accepts, after at most one space."""
    start = {"name": "start", "lark_grammar": 'start: " "? @value'}
    rules = [start, schema_rule("value", schema, "json_schema")]
    return Grammar("json_schema", json.dumps({"grammars": rules}))


def regex(pattern: str) -> Grammar:
    """A text that the whole pattern matches; no look-around, as in Rust's `regex`."""
    return Grammar("regex", pattern)


def lark(text: str) -> Grammar:
    """A text of the rule `start` of a Lark grammar."""
    return Grammar("lark", text)


def schema_rule(
    name: str, schema: Mapping[str, object] | bool | str, field: str
) -> dict[str, object]:
    """A rule for llguidance whose references are the schema's own; ValueError names `field`."""
    _check_schema(schema, field)
    try:
        value = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{field}: not JSON ({error}); give a JSON schema") from None
    if not isinstance(value, dict | bool):
        raise ValueError(f"{field}: {shortened(repr(value))} is no JSON schema; give an object")
    if isinstance(schema, str):
        _check_schema(value, field)
    if value is not False:
        own = value if isinstance(value, dict) else {}
        # "lenient" would pass over what cannot be kept
        value = {**own, "x-guidance": {"lenient": False, "whitespace_pattern": _WHITESPACE}}
    return {"name": name, "json_schema": value}


def _check_schema(schema: object, field: str) -> None:
    """ValueError for a schema that is larger than any that is meant."""
    num_parts = num_references = depth = longest = 0
    left = [(schema, 0)]  # without recursion, however deep it is
    while left and num_parts <= _MOST_PARTS:
        value, level = left.pop()
        num_parts += 1
        depth = max(depth, level)
        if isinstance(value, dict):
            num_references += "$ref" in value
            longest = max(longest, *map(_length, [*value, *_matched(value)]))
            value = list(value.values())
        if isinstance(value, list):
            left += [(part, level + 1) for part in value]
    for count, most, what in (
        (num_parts, _MOST_PARTS, "values"),
        (depth, _MOST_DEPTH, "levels of objects and lists"),
        (num_references, _MOST_REFERENCES, "references ($ref)"),
        (longest, _MOST_STRING, "characters in a name, constant or pattern"),
    ):
        if count > most:
            raise ValueError(f"{field}: has more than {most} {what}; give a smaller schema")


def _matched(schema: dict[str, object]) -> list[object]:
    """Of an object of a schema, the values that a text is compared with."""
    options = schema.get("enum")
    known = options if isinstance(options, list) else []
    return [schema.get("const"), schema.get("pattern"), *known]


def _length(value: object) -> int:
    return len(value) if isinstance(value, str) else 0


def one_line(message: str) -> str:
    """What the library says, for one line of ours."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    if " " not in line:  # its name for that, such as NoExtensionBias
        line = f"no token can follow this text ({line})"
    return shortened(line)


def shortened(line: str) -> str:
    """No more of it than anyone reads."""
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
