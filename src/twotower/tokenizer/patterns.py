"""Regular expressions of a tokenizer file: which of them could take forever.

The library's matcher backtracks. Its time is bounded here by form: what repeats without a bound may
not vary inside, and few such repetitions may follow one another. Published tokenizers keep to that.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_CHARS = 4096
MAX_REPEATS = 2  # without a bound, one after the other: time goes with that power of the length
_MANY = 100  # a repetition up to so often counts as one without a bound
_FEW = 8  # of a part that varies itself
_OPEN = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|<\w+>|[ims-]+:))?(?!\?)")
_FLAGS = re.compile(r"\(\?[ims-]+\)")
_REPEAT = re.compile(r"([*+?])[+?]?|\{(\d*)(,?)(\d*)\}\??")
_ESCAPE = re.compile(r"\\(?:[pPxu]\{[^{}]*\}|[^gk1-9])", re.DOTALL)  # no reference to a group


@dataclass
class _Group:
    """An open group: repetitions without a bound in its present branch and in its longest one."""

    now: int = 0
    most: int = 0
    varies: bool = False


def why_refused(pattern: str) -> str:
    """What could take the matcher forever; "" if nothing."""
    if len(pattern) > MAX_CHARS:
        return f"is longer than {MAX_CHARS} characters"
    groups = [_Group()]
    for kind, varies, most in _items(pattern):
        match kind:
            case "(":
                groups.append(_Group())
                continue
            case "|":
                groups[-1].now, groups[-1].varies = 0, True
                continue
            case ")" if len(groups) > 1:
                inner = groups.pop()
                if most > _FEW and inner.varies:
                    return "repeats a part that varies itself, which can take forever"
                groups[-1].now += inner.most
                groups[-1].varies |= inner.varies
            case "" | ")":
                return "has a part that is not known here"
        group = groups[-1]
        group.now += most > _MANY
        group.most = max(group.most, group.now)
        group.varies |= varies
        if group.now > MAX_REPEATS:
            return f"repeats more than {MAX_REPEATS} parts without a bound, one after the other"
    return ""


def _items(pattern: str) -> Iterator[tuple[str, bool, float]]:
    """Parts in order: kind ("(", ")", "|", "x" for a character or class, "" for what is unknown),
    whether it may be there more or less often, and how often at most.
    """
    at = 0
    while at < len(pattern):
        kind, at = _part(pattern, at)
        varies, most = False, 1.0
        repeat = _REPEAT.match(pattern, at) if kind in (")", "x") else None
        if repeat:
            sign, low, comma, high = repeat.groups()
            at = repeat.end()
            is_unbounded = sign in ("*", "+") or (bool(comma) and not high)
            most = float("inf") if is_unbounded else float(high or low or 1)
            varies = bool(sign) or (bool(comma) and low != high)
            if _REPEAT.match(pattern, at):  # a repetition of a repetition
                kind = ""
        yield kind, varies, most
        if not kind:
            return


def _part(pattern: str, at: int) -> tuple[str, int]:
    """The kind of the part that begins there, and where it ends."""
    character = pattern[at]
    if character in "|)":
        return character, at + 1
    if character == "(":
        if flags := _FLAGS.match(pattern, at):
            return "x", flags.end()
        opened = _OPEN.match(pattern, at)
        return ("(", opened.end()) if opened else ("", at)
    if character == "[":
        return _class(pattern, at)
    if character == "\\":
        escape = _ESCAPE.match(pattern, at)
        return ("x", escape.end()) if escape else ("", at)
    return "x", at + 1


def _class(pattern: str, at: int) -> tuple[str, int]:
    """A class of characters, which may hold others."""
    depth, start = 0, -1
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif character == "[":
            depth, start = depth + 1, at + 1
            if pattern[start : start + 1] == "^":
                at, start = at + 1, start + 1
        elif character == "]" and at != start:  # the first one is a character
            depth -= 1
        at += 1
        if not depth:
            return "x", at
    return "", at
