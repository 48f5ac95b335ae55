"""The server's filters, from what its options name."""

import re
from collections.abc import Sequence

from twotower.engine.filters import Filter, function_filter, pattern_filter

_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def read_filters(named: Sequence[str]) -> tuple[Filter, ...]:
    """A filter for each pattern or module:function; ValueError (one line) for a bad one.

    A pattern that looks like module:function is spelt module[:]function.
    """
    return tuple(
        function_filter(name) if _ENTRY_POINT.fullmatch(name) else pattern_filter(name)
        for name in named
    )
