"""What a text must match, token by token: a JSON schema, tool calls, a regex or a Lark grammar.

A `Grammar` is a rule, a `GrammarState` is where one row is in it. The rules themselves are the
library's (llguidance): which tokens may follow, and whether the text may end here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from twotower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

GrammarKind = Literal["json_schema", "tool_call", "regex", "lark"]
_FORBIDDEN = "doesn't satisfy the grammar"  # in the library's words
_LONGEST_REASON = 300  # characters of the library's explanation
# Between the parts of a JSON text: a space, or a new line and its indent. With more, a model that
# has nothing to say writes spaces until its length is used up.
_WHITESPACE = r"( |\n[ \t]{0,32})"


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
    try:
        value = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{field}: not JSON ({error}); give a JSON schema") from None
    if not isinstance(value, dict | bool):
        raise ValueError(f"{field}: {value!r} is no JSON schema; give an object")
    if value is not False:
        own = value if isinstance(value, dict) else {}
        # "lenient" would pass over what cannot be kept
        value = {**own, "x-guidance": {"lenient": False, "whitespace_pattern": _WHITESPACE}}
    return {"name": name, "json_schema": value}


@dataclass(frozen=True)
class TokenRules:
    """What is true of tokens under any grammar."""

    eos: tuple[int, ...]  # end a text, where the grammar lets it end
    mask_token_id: int  # never text
    vocab_size: int  # of the model


class GrammarState:
    """Where one row's text is in its grammar; cheap to take back, so drafts may be tried."""

    def __init__(self, matcher: LLMatcher, rules: TokenRules, tokenizer: Tokenizer) -> None:
        self._matcher = matcher
        self._rules = rules
        # A model may have more tokens than its tokenizer; the library must not be asked for those.
        beyond = range(tokenizer.vocab_size, rules.vocab_size)
        special = {*tokenizer.special_ids, *beyond, rules.mask_token_id}
        self._banned = frozenset(special - set(rules.eos))
        self._read: list[int] = []

    def follow(self, tokens: Sequence[int]) -> None:
        """Be after tokens, all of them allowed where they stand, whatever was followed before."""
        known = _num_shared(self._read, tokens)
        if known < len(self._read):
            self._matcher.rollback(len(self._read) - known)
        new = list(tokens[known:])
        if new and not self._matcher.consume_tokens(new):
            raise self._failed("a token that it forbids was committed")
        self._read = list(tokens)

    def mask(self) -> Tensor:
        """The tokens that may come next: (V,) bool on the CPU, at least one.

        Where the grammar leaves one way to go on, its characters are spelt as the tokenizer would.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.unpackbits(bits, bitorder="little")[: self._rules.vocab_size].astype(bool)
        mask = torch.zeros(self._rules.vocab_size, dtype=torch.bool)
        mask[: len(found)] = torch.from_numpy(found)
        mask[list(self._banned)] = False
        mask[list(self._rules.eos)] = self._matcher.is_accepting()
        if self._matcher.is_error() or not bool(mask.any()):
            raise self._failed("no token can follow this text")
        return mask

    def forced(self) -> list[int]:
        """Tokens that spell what must come next, if anything must."""
        tokens = self._matcher.compute_ff_tokens()
        return [] if self._banned.intersection(tokens) else tokens

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens could come next, one after the other; the end comes last."""
        never = self._banned | set(self._rules.eos)
        usual = list(itertools.takewhile(lambda token: token not in never, tokens))
        count = self._matcher.validate_tokens(usual)
        is_end = count == len(usual) and tokens[count : count + 1] in [
            [eos] for eos in self._rules.eos
        ]
        return count + is_end

    def _failed(self, reason: str) -> GrammarFailed:
        told = _one_line(self._matcher.get_error())
        is_ours = _FORBIDDEN in told  # we gave it a token that it forbids
        return GrammarFailed(f"grammar: {told or reason}", bool(told) and not is_ours)


def begin(grammar: Grammar, tokenizer: Tokenizer, rules: TokenRules) -> GrammarState:
    """The state before the first token. ValueError (one line) for a grammar that is damaged, uses
    what the library cannot keep, or allows no text.
    """
    state = GrammarState(_matcher(grammar, tokenizer).deep_copy(), rules, tokenizer)
    try:
        state.mask()
    except GrammarFailed as error:
        raise ValueError(str(error)) from None
    return state


@lru_cache(maxsize=64)  # compiling costs milliseconds, a copy microseconds
def _matcher(grammar: Grammar, tokenizer: Tokenizer) -> LLMatcher:
    vocabulary = _vocabulary(tokenizer)
    from llguidance import LLMatcher, LLParserLimits

    source = grammar.source
    if grammar.kind == "regex":
        source = LLMatcher.grammar_from_regex(source)
    elif grammar.kind == "lark":
        source = LLMatcher.grammar_from_lark(source)
    limits = LLParserLimits(verbose_errors=False)  # which would quote the text
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(f"{grammar.kind}: {_one_line(matcher.get_error())}")
    return matcher


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise ValueError(
            "grammar needs the library llguidance; install it with: pip install 'twotower[serve]'"
        ) from None
    try:
        return LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size)
    except ValueError as error:
        raise ValueError(
            f"grammar: this tokenizer's tokens cannot be read as bytes ({_one_line(str(error))}); "
            "use a byte-level BPE tokenizer"
        ) from None


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens are the same from the beginning."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def _one_line(message: str) -> str:
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
