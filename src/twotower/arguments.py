"""One line for an argument of a wrong type or size, instead of a traceback from inside."""

import math
import reprlib
from collections.abc import Iterable


def require(name: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """ValueError (one line) unless the value is of a kind; remedy: what to pass."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={reprlib.repr(value)} is no {_named(kind)}; pass {remedy}")


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(one.__name__ for one in kinds if one is not type(None))


def require_numbers(
    options: object,
    names: Iterable[str],
    low: float,
    high: float = math.inf,
    is_above: bool = False,
) -> None:
    """ValueError (one line) for a named field that is not None and outside low to high, both
    included but for a low that it must be above. Infinite and NaN are always outside.
    """
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        is_inside = (low < value if is_above else low <= value) and value <= high
        if is_inside and math.isfinite(value):
            continue
        least = f"{'above' if is_above else 'at least'} {low:g}"
        if high < math.inf:
            allowed = f"{least} and at most {high:g}"
        elif isinstance(value, float):
            allowed = f"a finite number{' ' if is_above else ', '}{least}"
        else:
            allowed = least
        raise ValueError(f"{name}={value} must be {allowed}")
