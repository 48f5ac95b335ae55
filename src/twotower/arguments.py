"""What an argument or an option may be: each refusal is one line, not a traceback from inside."""

import difflib
import math
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

_MAX_WHOLE = 2**63 - 1
Problem = Callable[[object], str | None]  # what is wrong with a value, if anything
_repr = reprlib.Repr()  # nobody reads a megabyte
_repr.maxstring = _repr.maxlong = _repr.maxother = 80


def require(name: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """ValueError (one line) unless the value is of a kind; remedy: what to pass."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        named = " or ".join(one.__name__ for one in kinds if one is not type(None))
        raise ValueError(f"{name}={shown(value)} is not of type {named}; pass {remedy}")


def require_unicode(text: str, where: str) -> str:
    """The text; ValueError for half a surrogate pair, which JSON and command lines may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not UTF-8 text; correct or remove it") from None
    return text


def shown(value: object) -> str:
    """A value as a message shows it: short, and on one line where its own form has several."""
    return " ".join(_repr.repr(str(value) if isinstance(value, Path) else value).split())


def check(values: Mapping[str, object], checks: Mapping[str, Problem]) -> None:
    """ValueError (one line) for the first named value that is not as its check wants it."""
    for name, value in values.items():
        if (problem := checks[name](value)) is not None:
            raise ValueError(f"{name}={shown(value)} {problem}")


def check_fields(options: object, checks: Mapping[str, Problem]) -> None:
    """The same for fields of a dataclass; None is taken where it is the field's default."""
    values = ((name, getattr(options, name)) for name in checks)
    kind = type(options)
    check({n: v for n, v in values if v is not None or getattr(kind, n, n) is not None}, checks)


def number(
    low: float,
    high: float = math.inf,
    *,
    is_whole: bool = False,
    is_above: bool = False,
    is_below: bool = False,
) -> Problem:
    """A finite number from `low`, or above it, to `high`, or below it; of 64 bits where whole."""
    kinds = (int,) if is_whole else (int, float)
    most = min(high, _MAX_WHOLE if is_whole else sys.float_info.max)
    least = f"{'above' if is_above else 'at least'} {low}"
    highest = f"{'below' if is_below else 'at most'} {high}"
    is_open = is_above or is_below
    allowed = f"{least} and {highest}" if is_open else f"between {low} and {high}"

    def problem(value: object) -> str | None:
        if not isinstance(value, kinds) or isinstance(value, bool):
            return f"must be a {'whole ' * is_whole}number"
        is_enough = value > low if is_above else value >= low
        if is_enough and (value < high if is_below else value <= most):
            return None
        if high < math.inf:
            return f"must be {allowed}"
        if is_whole and value > most:
            return f"must be at most {most}"
        is_small = isinstance(value, int) and value < most
        finite = "" if is_small else f"a finite number{' ' if is_above else ', '}"
        return f"must be {finite}{least}"

    return problem


COUNT = number(1, is_whole=True)
THREADS = number(1, 1024, is_whole=True)  # the system ends a process that starts too many
INDEX = number(0, is_whole=True)
SHARE = number(0, 1)
ABOVE_ZERO = number(0, is_above=True)


def nearest(name: str, known: Collection[str]) -> str:
    """', perhaps NAME' for the closest known name, if one is close."""
    begun = [other for other in known if name and other.startswith(name.lower())]
    found = begun or difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.65)
    return f", perhaps {found[0]}" if found else ""


def either(words: Sequence[str]) -> str:
    """ "a, b or c"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def one_of(*choices: str) -> Problem:
    """One of some words."""

    def problem(value: object) -> str | None:
        return None if value in choices else f"is unknown; use one of {', '.join(choices)}"

    return problem


def each(problem: Problem, count: int | None = None) -> Problem:
    """A tuple of such values, of any length or of `count`."""

    def found(values: object) -> str | None:
        if not isinstance(values, tuple) or count not in (None, len(values)):
            return f"must be a list of {count or 'values'}"
        return next(filter(None, map(problem, values)), None)

    return found


def nonempty(value: object) -> str | None:
    """Text that is not empty."""
    return None if isinstance(value, str) and value else "must be text that is not empty"


def instance(kind: type, words: str) -> Problem:
    """A value of a kind, which `words` name."""
    return lambda value: None if isinstance(value, kind) else f"must be {words}"


A_SWITCH = instance(bool, "true or false")


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
