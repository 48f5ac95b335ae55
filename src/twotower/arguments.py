"""What an argument or an option may be: each refusal is one line, not a traceback from inside."""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MOST_BIASED = 1024  # tokens of a logit_bias
_MOST_WHOLE = 2**63 - 1
Problem = Callable[[object], str | None]  # what is wrong with a value, if anything


def require(name: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """ValueError (one line) unless the value is of a kind; remedy: what to pass."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        named = " or ".join(one.__name__ for one in kinds if one is not type(None))
        raise ValueError(f"{name}={reprlib.repr(value)} is no {named}; pass {remedy}")


def check(values: Mapping[str, object], checks: Mapping[str, Problem]) -> None:
    """ValueError (one line) for the first named value that is not as its check wants it."""
    for name, value in values.items():
        if (problem := checks[name](value)) is not None:
            raise ValueError(f"{name}={value!r} {problem}")


def require_numbers(options: object, names: Iterable[str], problem: Problem) -> None:
    """ValueError (one line) for a named field that is neither None nor such a `number`."""
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    check(given, dict.fromkeys(given, problem))


def number(
    low: float, high: float = math.inf, *, is_whole: bool = False, is_above: bool = False
) -> Problem:
    """A number from `low`, or above it, to `high`: finite, and within 64 bits where it is whole."""
    kinds = (int,) if is_whole else (int, float)
    most = min(high, _MOST_WHOLE) if is_whole else high
    least = f"{'above' if is_above else 'at least'} {low}"
    allowed = f"{least} and at most {high}" if is_above else f"between {low} and {high}"

    def problem(value: object) -> str | None:
        if not isinstance(value, kinds) or isinstance(value, bool):
            return f"must be a {'whole ' * is_whole}number"
        is_inside = (low < value if is_above else low <= value) and value <= most
        if is_inside and _is_finite(value):
            return None
        if high < math.inf:
            return f"must be {allowed}"
        if is_whole and value > most:
            return f"must be at most {most}"
        is_small = isinstance(value, int) and not is_inside
        finite = "" if is_small else f"a finite number{' ' if is_above else ', '}"
        return f"must be {finite}{least}"

    return problem


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def one_of(*choices: str) -> Problem:
    """One of some words."""

    def problem(value: object) -> str | None:
        return None if value in choices else f"is unknown; use one of {', '.join(choices)}"

    return problem


def instance(kind: type, words: str) -> Problem:
    """A value of a kind, which `words` name."""
    return lambda value: None if isinstance(value, kind) else f"must be {words}"


def token_ids(value: object) -> str | None:
    """A token id, or several."""
    ids = value if isinstance(value, tuple) else (value,)
    are_ids = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids)
    return None if are_ids else "must be a token id, or a list of them"


def strings(value: object) -> str | None:
    """Text that is not empty, or several."""
    texts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(text, str) for text in texts):
        return "must be text, or a list of texts"
    return None if all(texts) else "has an empty string; leave it out"


def as_pairs(biases: Mapping[Any, Any]) -> tuple[tuple[Any, Any], ...]:
    """Tokens and biases; the names of a JSON object are text."""
    return tuple(
        (
            int(token) if isinstance(token, str) and re.fullmatch("[0-9]{1,9}", token) else token,
            bias,
        )
        for token, bias in biases.items()
    )


def biases(value: object) -> str | None:
    """Pairs of tokens and what is added to their logits."""
    pairs = value if isinstance(value, tuple) else (value,)
    if len(pairs) > MOST_BIASED:
        return f"must name at most {MOST_BIASED} tokens"
    are_good = all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and token_ids(pair[0]) is None
        and _bias(pair[1]) is None
        for pair in pairs
    )
    return None if are_good else "must map token ids to numbers between -100 and 100"


_bias = number(-100, 100)
