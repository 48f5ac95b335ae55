"""logit_bias of a request: pairs of a token and what is added to its logit."""

import re
from collections.abc import Mapping
from typing import Any

from twotower.arguments import number, token_ids

LogitBias = tuple[tuple[int, float], ...]
MAX_BIASED = 1024  # tokens
_bias = number(-100, 100)


def as_pairs(biases: Mapping[Any, Any]) -> LogitBias:
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
    if len(pairs) > MAX_BIASED:
        return f"must name at most {MAX_BIASED} tokens"
    are_good = all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and token_ids(pair[0]) is None
        and _bias(pair[1]) is None
        for pair in pairs
    )
    return None if are_good else "must map token ids to numbers between -100 and 100"
