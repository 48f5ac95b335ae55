"""Grammars in processes of their own: the program that `grammar.py` runs in a fork server.

A process first reads a vocabulary; a copy of it builds one grammar; copies of that follow one text
each. A request is a letter and what belongs to it; numbers have 32 bits.
"""

import array
import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

VOCABULARY = b"v"  # its size, then the text of a tokenizer file
BUILD = b"b"  # a grammar as JSON: the reply is its memory in KiB, then what can come first
FOLLOW = b"f"  # tokens to take back, then new ones: the reply is what can come next, see `_next`
ALLOWED = b"a"  # tokens: the reply is how many of them could come next, one after the other
MASKS = b"m"  # tokens that could: the reply is the masks after each of them


_MAX_TRIED = 300  # parts of a schema, to find the one that is refused


def numbers(values: Sequence[int]) -> bytes:
    """Numbers as they travel."""
    return array.array("I", values).tobytes()


def from_numbers(content: bytes) -> list[int]:
    """The numbers of `numbers`."""
    return array.array("I", content).tolist()


class Program:
    """What one process knows."""

    def __init__(self) -> None:
        self._vocabulary: Any = None
        self._matcher: Any = None

    def copy(self) -> "Program":
        """Another that goes its own way."""
        other = copy.copy(self)
        if self._matcher is not None:
            other._matcher = self._matcher.deep_copy()
        return other

    def answer(self, request: bytes) -> bytes:
        """Do what the first letter says. ValueError in the library's words."""
        kind, content = request[:1], request[1:]
        if kind == VOCABULARY:
            return self._read_vocabulary(from_numbers(content[:4])[0], content[4:].decode())
        if kind == BUILD:
            return self._build(**json.loads(content))
        tokens = from_numbers(content)
        if kind == FOLLOW:
            return self._follow(tokens[0], tokens[1:])
        # What is only looked at must not end the text with an error.
        ahead = self._matcher.deep_copy()
        if kind == ALLOWED:
            return numbers([ahead.validate_tokens(tokens)])
        return b"".join(_masks(ahead, tokens))

    def _read_vocabulary(self, size: int, text: str) -> bytes:
        from llguidance import LLTokenizer

        self._vocabulary = LLTokenizer(text, n_vocab=size)
        added = json.loads(text).get("added_tokens") or []
        ordinary = {
            token["content"].encode(): token["id"]
            for token in added
            if not token["special"] and self._vocabulary.is_special_token(token["id"])
        }
        if ordinary:
            from llguidance import TokenizerWrapper

            told = TokenizerWrapper(_Spelt(self._vocabulary, ordinary))
            self._vocabulary = LLTokenizer(told, n_vocab=size)
        return b""

    def _build(self, kind: str, source: str) -> bytes:
        from llguidance import LLMatcher, LLParserLimits

        if kind == "regex":
            source = LLMatcher.grammar_from_regex(source)
        elif kind == "lark":
            source = LLMatcher.grammar_from_lark(source)
        limits = LLParserLimits(verbose_errors=False)  # which would quote the text
        rules = json.loads(source)["grammars"] if kind in ("json_schema", "tool_call") else []
        fields = {rule["name"]: rule.pop("field", "") for rule in rules}

        def matcher(source: str) -> Any:
            return LLMatcher(self._vocabulary, source, log_level=0, limits=limits)

        self._matcher = matcher(json.dumps({"grammars": rules}) if rules else source)
        if self._matcher.is_error():
            for rule in rules:
                if place := _why_refused(rule, matcher):
                    raise ValueError(f"{fields[rule['name']]}{place}")
        first = self._follow(0, [])  # which may take more than all before
        return numbers([_own_memory() >> 10]) + first

    def _follow(self, num_back: int, new: list[int]) -> bytes:
        if num_back:
            self._matcher.rollback(num_back)
        if new:
            self._matcher.consume_tokens(new)
        self._check()
        reply = _next(self._matcher)
        self._check()
        return reply

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())


class _Spelt:
    """A vocabulary as the library asks for it, in which some added tokens are letters of a text: it
    takes all between < and > for special ones, such as the <tool_call> that Qwen's models write.
    """

    def __init__(self, known: Any, ordinary: dict[bytes, int]) -> None:
        self._known, self._ordinary = known, ordinary
        longest_first = sorted(map(re.escape, ordinary), key=len, reverse=True)
        self._pattern = re.compile(b"(" + b"|".join(longest_first) + b")")
        every = range(known.vocab_size)
        self.eos_token_id, self.bos_token_id = known.eos_token, None
        self.tokens = [known.decode_bytes([token]) for token in every]
        special = filter(known.is_special_token, every)
        self.special_token_ids = sorted(set(special) - set(ordinary.values()))

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text."""
        found: list[int] = []
        for part in self._pattern.split(text):
            token = self._ordinary.get(part)
            found += self._known.tokenize_bytes(part) if token is None else [token]
        return found


def _why_refused(rule: dict[str, Any], matcher: Callable[[str], Any]) -> str:
    """Of a rule that the library does not take by itself: the path of the smallest part of its
    schema that it does not take either, and its words; "" for one that it takes.
    """
    root = rule.get("json_schema")
    if not isinstance(root, dict):
        return ""
    own = {key: root[key] for key in ("x-guidance", "$defs", "definitions") if key in root}
    num_left = _MAX_TRIED

    def refusal(schema: Any) -> str:
        nonlocal num_left
        num_left -= 1
        value = {**own, **schema} if isinstance(schema, dict) else schema
        start = {"name": "start", "lark_grammar": "start: @value"}
        rules = [start, {"name": "value", "json_schema": value}]
        tried = matcher(json.dumps({"grammars": rules}))
        return str(tried.get_error()) if tried.is_error() else ""

    path, schema, words = "", root, refusal(root)
    is_deeper = bool(words)
    while is_deeper:
        is_deeper = False
        for name, part in _parts(schema):
            if num_left > 0 and (found := refusal(part)):
                path, schema, words, is_deeper = path + name, part, found, True
                break
    return f"{path and f': at {path[1:]}'}: {words}" if words else ""


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, each with its place."""
    for key, value in schema.items() if isinstance(schema, dict) else ():
        if key in ("properties", "patternProperties", "$defs", "definitions"):
            yield from ((f".{key}.{name}", part) for name, part in value.items())
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            yield from ((f".{key}.{number}", part) for number, part in enumerate(value))
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            yield f".{key}", value  # `false` by itself is refused, and is no reason


def _next(matcher: Any) -> bytes:
    """How many tokens spell what must come next, these, and a mask."""
    forced = matcher.compute_ff_tokens()
    return numbers([len(forced), *forced]) + _mask(matcher)


def _mask(matcher: Any) -> bytes:
    """Whether the text may end, as a byte, and a bit for each token that may come next."""
    is_accepting = bytes([matcher.is_accepting()])
    return is_accepting + bytes(matcher.compute_bitmask())


def _masks(matcher: Any, tokens: list[int]) -> list[bytes]:
    """As far as they can be had."""
    masks = []
    for token in tokens:
        if not matcher.consume_token(token):
            break
        masks.append(_mask(matcher))
        if matcher.is_error():
            return masks[:-1]
    return masks


def _own_memory() -> int:
    """Bytes of this process that it shares with no other; 0 where that is not known."""
    maps = Path("/proc/self/smaps_rollup")
    if not maps.exists():
        return 0
    lines = [line.split() for line in maps.read_text().splitlines()]
    return sum(int(line[1]) for line in lines if line[0].startswith("Private_")) << 10
