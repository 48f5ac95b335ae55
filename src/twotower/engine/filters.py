"""Filters see a row's text before anyone else and end the row before what they match.

A filter is asked once for each character, in order, whatever tokens or blocks brought it: so what
is shown does not depend on them. `num_held` characters at the end are kept back until it is
certain that no match begins in them.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from re import _constants, _parser  # type: ignore[attr-defined]  # the only way to widths

from twotower.arguments import check, number

MAX_MATCH_CHARS = 10_000
# Is there a match of which the text's first `end` characters are the last to be needed? Gives its
# first character. `is_over`: no text will follow them.
Find = Callable[[str, int, bool], int | None]


class FilterFailed(Exception):
    """A filter could not judge a text, so nothing more of it may be shown."""


@dataclass(frozen=True)
class Filter:
    """What to look for; made by `pattern_filter` or `function_filter`."""

    name: str  # for messages: a pattern or "module:function"
    num_held: int  # characters at the end of a text that a match may still begin in
    find: Find


def pattern_filter(pattern: str, max_match_chars: int = 100) -> Filter:
    """Look for a regex of Python's `re`: a text matches as soon as its first characters do.

    A match of more than max_match_chars is seen only if some part of it of that length matches;
    patterns without * or + are never longer than they are. ValueError (one line) for a pattern
    that is damaged, can match empty text, or looks ahead.
    """
    _check_chars(max_match_chars)
    try:
        parsed, compiled = _parser.parse(pattern), re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"filter: {pattern!r} is not a regular expression ({error})") from None
    shortest, longest = parsed.getwidth()
    if shortest == 0:
        raise ValueError(
            f"filter: {pattern!r} can match empty text, which would end every row; make a part "
            "of it necessary"
        )
    found = set(_assertions(parsed))
    if "ahead" in found:
        raise ValueError(
            f"filter: {pattern!r} looks ahead, at text that may never come; use \\b or $, or "
            "match that text too"
        )
    most = min(longest, max_match_chars)
    if "boundary" in found:
        return Filter(pattern, most, _boundary_finder(compiled, most))
    return Filter(pattern, most - 1, _finder(compiled, most))


def _finder(pattern: re.Pattern[str], most: int) -> Find:
    def find(text: str, end: int, is_over: bool) -> int | None:
        match = pattern.search(text, max(0, end - most), end)
        return None if match is None else match.start()

    return find


def _boundary_finder(pattern: re.Pattern[str], most: int) -> Find:
    """\\b and $ depend on the character behind a match: it counts once that one has been seen, or
    none will come.
    """

    def find(text: str, end: int, is_over: bool) -> int | None:
        last = end if is_over else end - 1  # where a match may end
        at = max(0, last - most)
        while match := pattern.search(text, at, end):
            start = match.start()
            if match.end() <= last or pattern.match(text, start, last):
                return start
            at = start + 1
        return None

    return find


def function_filter(entry_point: str, max_match_chars: int = 100) -> Filter:
    """Ask a Python function "module:name": it gets a text and says where a match begins, or None.

    It is called with each beginning of a row's text, one character longer each time, so it should
    be quick. A match that began more than max_match_chars before the end is cut there: what is
    before has been shown. ValueError (one line) if there is no such function.
    """
    _check_chars(max_match_chars)
    function = _load(entry_point)

    def find(text: str, end: int, is_over: bool) -> int | None:
        if is_over:
            return None  # it has seen this text
        try:
            start = function(text[:end])
        except Exception as error:  # someone else's code: any of it may fail
            raise FilterFailed(
                f"filter: {entry_point} failed ({type(error).__name__}); the row is ended"
            ) from error
        if start is None:
            return None
        if type(start) is not int or not 0 <= start < end:
            raise FilterFailed(
                f"filter: {entry_point} returned {start!r} for a text of {end} characters; it "
                "must return where a match begins, or None"
            )
        return max(start, end - max_match_chars)

    return Filter(entry_point, max_match_chars - 1, find)


def _load(entry_point: str) -> Callable[[str], object]:
    module, _, name = entry_point.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"filter: {entry_point!r} cannot be loaded ({error}); name an importable function "
            "as module:function"
        ) from None
    if not callable(function):
        raise ValueError(f"filter: {entry_point!r} is not a function; name one as module:function")
    called: Callable[[str], object] = function
    return called


def _check_chars(max_match_chars: int) -> None:
    allowed = number(1, MAX_MATCH_CHARS, is_whole=True)
    check({"max_match_chars": max_match_chars}, {"max_match_chars": allowed})


def _assertions(node: object) -> Iterator[str]:
    """Which conditions on the text beside a match a parsed pattern has: "boundary", "ahead"."""
    if isinstance(node, tuple) and len(node) == 2:
        operation, argument = node
        if operation in (_constants.ASSERT, _constants.ASSERT_NOT) and argument[0] > 0:
            yield "ahead"
        elif operation is _constants.AT and argument not in (
            _constants.AT_BEGINNING,
            _constants.AT_BEGINNING_STRING,
        ):
            yield "boundary"
    if isinstance(node, tuple | list | _parser.SubPattern):
        for child in node:
            yield from _assertions(child)
