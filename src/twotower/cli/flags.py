"""Flags from an options dataclass of the library, of which only those that were given come back.

Types, help and defaults are read from the dataclass, where they are written once.
"""

import dataclasses
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from types import NoneType
from typing import Annotated, Literal, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import tyro
from tyro.constructors import PrimitiveConstructorSpec

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


def optional_flags(
    options_class: type,
    docs: Mapping[str, str],
    first: Sequence[str] = (),
    leave_out: Collection[str] = (),
) -> type:
    """A dictionary type with the fields of a dataclass, some of them first and none of them
    required, for tyro to fill.
    """
    hints = get_type_hints(options_class)
    flags: dict[str, object] = {}
    aliases = aliases_of(options_class)
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    for field in (*map(fields.pop, first), *fields.values()):
        if field.name not in leave_out:
            shown = tyro.conf.arg(
                aliases=aliases.get(field.name),
                help=with_flags(docs[field.name], hints),
                help_behavior_hint=""
                if field.default is False
                else f"(default: {_spell(field.default)})",
            )
            hint = hints[field.name]
            specs = [_alternatives(hint)] if NoneType in get_args(hint) else []
            flags[field.name] = Annotated[(hint, *specs, shown)]
    # Made at run time, so there is nothing for a type checker to see.
    return TypedDict("decoding", flags, total=False)  # type: ignore[operator, no-any-return]


def with_flags(text: str, names: Collection[str]) -> str:
    """A field's help in the words of a command line: other fields are named as flags."""
    known = "|".join(names)
    text = re.sub(rf"\b({known})=", lambda match: f"{_flag(match[1])} ", text)
    return re.sub(r"\w+_\w+", lambda m: _flag(m[0]) if m[0] in names else m[0], text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _spell(value: object) -> str:
    return "none" if value in (None, ()) else str(value)


def _alternatives(hint: object) -> PrimitiveConstructorSpec[object]:
    """How to read `int | None` and the like: a number, one of the words, or none."""
    words = [w for part in get_args(hint) if get_origin(part) is Literal for w in get_args(part)]
    numbers: list[Callable[[str], object]] = [k for k in (int, float) if k in get_args(hint)]
    metavar = "|".join(
        [*(k.__name__.upper() for k in (int, float) if k in numbers), *words, "none"]
    )

    def read(arguments: list[str]) -> object:
        (text,) = arguments
        if text.lower() == "none":
            return None
        if text in words:
            return text
        for number in numbers:
            try:
                return number(text)
            except ValueError:
                continue
        kinds = ["a whole number" if number is int else "a number" for number in numbers]
        raise ValueError(f"{text!r} must be {', '.join([*kinds, *words])} or none")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_spell(value)],
    )


def name_flags(message: str, options_class: type, arguments: Sequence[str]) -> str:
    """An error of the library in the words of a command line: `field=value` and `field: ...` name
    the flags that were typed, or the verb's where the error is about its options.
    """
    known = {name: _flag(name) for name in _flag_fields(options_class)}
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
    message = re.sub(
        r"(?<![\w.])(\w+)=('[^']*'(?: or '[^']*')*|(?=[^\s=]))",
        lambda match: f"{flags[match[1]]} {as_typed(match[2])}" if match[1] in flags else match[0],
        message,
    )
    # Elsewhere in the line only names that are no English words.
    return re.sub(r"(?<![\w.-])\w+_\w+", lambda match: flags.get(match[0], match[0]), message)


def as_typed(text: str) -> str:
    """Values in Python's quotes as a user types them, in quotes only where a shell needs some."""
    return re.sub("'([^']*)'", lambda match: shlex.quote(match[1]), text)


def _flag_fields(options_class: type) -> Iterator[str]:
    """Names of a verb's fields that are flags, and those of the options of decoding."""
    for name, hint in get_type_hints(options_class, include_extras=True).items():
        parts = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_typeddict(parts[0]):
            yield from parts[0].__annotations__
        elif tyro.conf.Positional not in parts[1:]:
            yield name
