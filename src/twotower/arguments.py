"""One line for an argument of a wrong type, instead of a traceback from inside."""

import reprlib


def require(name: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """ValueError (one line) unless the value is of a kind; remedy: what to pass."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={reprlib.repr(value)} is no {_named(kind)}; pass {remedy}")


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(one.__name__ for one in kinds if one is not type(None))
