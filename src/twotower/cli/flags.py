"""What the flags of an options dataclass are called, in every verb, and messages that name them."""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints, is_typeddict

import tyro

from twotower.documented import field_docs

# Other spellings of flags, the same in every verb.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "model": ("-m",),
    "max_new_tokens": ("-n", "--max-tokens"),
    "temperature": ("--temp",),
    "output": ("-o", "--out"),
    "prompt": ("-p",),
    "batch_size": ("--max-num-seqs",),
}


@cache
def decoding_docs() -> Mapping[str, str]:
    """The help of each field of `GenerateOptions` and `EngineOptions`, for every verb."""
    from twotower.engine.options import EngineOptions, GenerateOptions

    return field_docs(EngineOptions) | field_docs(GenerateOptions)


def aliases_of(options_class: type) -> dict[str, tuple[str, ...]]:
    """Other spellings of a class's flags, by field. A batch size with help of its own (rows of a
    training pass) is not the engine's, whose spellings it lacks.
    """
    docs = field_docs(options_class)
    found = {name: _ALIASES[name] for name in get_type_hints(options_class) if name in _ALIASES}
    if docs.get("batch_size", decoding_docs()["batch_size"]) != decoding_docs()["batch_size"]:
        del found["batch_size"]
    return found


def spellings(options_class: type) -> dict[str, str]:
    """Fields by the other long spellings of their flags, as a file of options may call them."""
    return {
        flag[2:].replace("-", "_"): name
        for name, flags in aliases_of(options_class).items()
        for flag in flags
        if flag.startswith("--")
    }


def by_field(values: Mapping[str, object], known: Mapping[str, str]) -> dict[str, object]:
    """Values by their fields' names; ValueError for a field in two `spellings`."""
    found: dict[str, object] = {}
    for spelling, value in values.items():
        name = known.get(spelling, spelling)
        if name in found:
            raise ValueError(f"{name}: is given in two spellings; leave one of them out")
        found[name] = value
    return found


def split_hint(hint: object) -> tuple[Any, list[Any]]:
    """A field's type, and what is annotated to it."""
    kind, *own = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return kind, own


def flag_types(options_class: type) -> dict[str, object]:
    """The types of a verb's fields that are flags, and of the options of decoding."""
    found: dict[str, object] = {}
    for name, hint in get_type_hints(options_class, include_extras=True).items():
        kind, own = split_hint(hint)
        if own and is_typeddict(own[0]):
            found |= get_type_hints(own[0])
        elif tyro.conf.Positional not in own:
            found[name] = kind
    return found


def with_flags(text: str, names: Collection[str]) -> str:
    """A field's help in the words of a command line: other fields are named as flags."""
    known = "|".join(names)
    text = re.sub(rf"\b({known})=", lambda match: f"{_flag(match[1])} ", text)
    text = re.sub(rf"`({known})`", lambda match: _flag(match[1]), text)
    return re.sub(r"\w+_\w+", lambda m: _flag(m[0]) if m[0] in names else m[0], text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def name_flags(message: str, options_class: type, arguments: Sequence[str]) -> str:
    """An error of the library in the words of a command line: `field=value` and `field: ...` name
    the flags that were typed, or the verb's where the error is about its options.
    """
    known = {name: _flag(name) for name in flag_types(options_class)}
    typed: dict[str, str] = {}
    for argument in arguments:
        flag = argument.partition("=")[0]
        if argument == "--":
            break
        if flag.startswith("-"):
            names = (name for name, others in _ALIASES.items() if flag in others)
            typed |= dict.fromkeys([flag.lstrip("-").replace("-", "_"), *names], flag)
    first = re.match(r"(\w+)(?=[=:])", message)
    is_of_options = first is not None and first[1] in known | typed
    flags = (known if is_of_options else {}) | typed
    if is_of_options:
        message = re.sub(r"^(\w+):", lambda match: f"{flags[match[1]]}:", message)
    switches = {name for name, kind in flag_types(options_class).items() if kind is bool}

    def as_flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name in switches and value in ("True", "False"):
            return _flag(name if value == "True" else f"no_{name}")
        return f"{flags[name]} {as_typed(value)}" if name in flags else match[0]

    message = re.sub(
        r"(?<![\w.])(\w+)=(True|False|'[^']*'(?: or '[^']*')*|\([^()]*\)|(?=[^\s=]))",
        as_flag,
        message,
    )
    # Elsewhere in the line only names that are no English words.
    return re.sub(r"(?<![\w.-])\w+_\w+", lambda match: flags.get(match[0], match[0]), message)


def as_typed(text: str) -> str:
    """Values in Python's quotes as a user types them: quoted for a shell, a tuple's one by one."""
    if text.startswith("("):
        text = text[1:-1].rstrip(",").replace(", ", " ")
    return re.sub("'([^']*)'", lambda match: shlex.quote(match[1]), text)
