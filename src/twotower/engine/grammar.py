"""What a text must match: a JSON schema, tool calls, a regex or a Lark grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_schema", "tool_call", "regex", "lark"]


@dataclass(frozen=True)
class Grammar:
    """A rule for whole texts; made by `json_schema`, `tool_call`, `regex` or `lark`.

    Whether it can be kept is known when a request meets a tokenizer: a bad one is a ValueError
    (one line) there.
    """

    kind: GrammarKind
    source: str  # as llguidance reads it
