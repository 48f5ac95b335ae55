"""What a value of an option may be: each check says what is wrong with one, if anything."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MOST_BIASED = 1024  # tokens of a logit_bias
Problem = Callable[[object], str | None]  # what is wrong with a value, if anything


def number(low: float, high: float = math.inf, is_whole: bool = False) -> Problem:
    """A number from `low` to `high`."""
    kinds = (int,) if is_whole else (int, float)
    least = f"at least {low}" if is_whole else f"a finite number, at least {low}"
    allowed = least if high == math.inf else f"between {low} and {high}"

    def problem(value: object) -> str | None:
        if not isinstance(value, kinds) or isinstance(value, bool):
            return f"must be a {'whole ' * is_whole}number"
        is_inside = low <= value <= high and not math.isinf(value)
        return None if is_inside else f"must be {allowed}"

    return problem


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
