"""Filters see committed text before anyone else and end a row before what they match."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Filter:
    """Made by `pattern_filter` or `function_filter`."""

    name: str
    num_held: int  # characters at the end of a text that may yet become part of a match
    find: Callable[[str, int, bool], int | None]  # text, its length so far, is it over -> start
