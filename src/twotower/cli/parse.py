"""Arguments into an options dataclass, with every refusal as one ValueError of one line."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import tyro

from twotower.arguments import check
from twotower.cli.flags import (
    aliases_of,
    as_typed,
    decoding_docs,
    flag_types,
    split_hint,
    with_flags,
)
from twotower.documented import field_docs, summary
from twotower.paths import a_path

T = TypeVar("T")
_METAVARS = {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT"}
_RULES = " -\u2500\u2570\u256f"  # what lines between and below a message are made of
_BRACKETS = str.maketrans("", "", "()[]'")
_NOT_A_NUMBER = (
    r"(\S+): (?:invalid literal for int|could not convert).*?: (.*)",
    r"(\S+): no type matching [^']* could be instantiated from \[(.*)\]",
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def parse(
    options_class: type[T], verb: str, arguments: Sequence[str], description: str | None = None
) -> T:
    """Options of a verb from its flags; `-h` prints help and raises SystemExit.

    ValueError (one line) for a wrong flag or value, or what the options' own checks say.
    """
    prog = f"twotower {verb}"
    for argument in itertools.takewhile(lambda word: word != "--", arguments):
        flag, equals, _ = argument.partition("=")
        if equals and flag in _switches(options_class):  # tyro would take the value as a prompt
            raise ValueError(f"{flag} takes no value; see {prog} -h")
    lists = {name: f"--{name.replace('_', '-')}" for name in _lists(options_class)}
    fields = {field.name: field.default for field in dataclasses.fields(options_class)}  # type: ignore[arg-type]
    # Lists may come again, so that tyro asks for none of them.
    required = [flag for name, flag in lists.items() if fields[name] is dataclasses.MISSING]
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            flags: object = tyro.cli(
                _flags_of(options_class),
                prog=prog,
                description=description or summary(options_class),
                args=list(arguments),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        said = _in_words(_unframe(refusal.getvalue()), options_class, arguments)
        if said.startswith("missing: "):
            said += "".join(f", {flag}" for flag in required if flag not in arguments)
        raise ValueError(f"{said}; see {prog} -h") from None
    values = _flat(flags)
    for name, flag in lists.items():
        if () in values[name]:  # named and left empty
            raise ValueError(f"{flag} needs a value; see {prog} -h")
        given = tuple(itertools.chain.from_iterable(values[name]))
        if flag in required and not given:
            raise ValueError(f"missing: {flag}; see {prog} -h")
        values[name] = given or fields[name]
    for name, value in values.items():
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                check({name: path}, {name: a_path})
    return options_class(**values)


def _switches(options_class: type) -> set[str]:
    """Flags that take no value."""
    words = [n.replace("_", "-") for n, kind in flag_types(options_class).items() if kind is bool]
    return {f"--{prefix}{word}" for word in words for prefix in ("", "no-")}


def _lists(options_class: type) -> set[str]:
    """Fields whose flags take any number of values, each time that they are given."""
    found = set()
    for name, hint in get_type_hints(options_class, include_extras=True).items():
        kind, own = split_hint(hint)
        kind = _without_none(kind)
        is_list = get_origin(kind) is tuple and Ellipsis in get_args(kind)
        if is_list and not {tyro.conf.UseAppendAction, tyro.conf.Positional} & {*own}:
            found.add(name)
    return found


def _flat(flags: object) -> dict[str, Any]:
    """Values by field name, out of their sections."""
    values: dict[str, Any] = {}
    for name, value in vars(flags).items():
        values |= _flat(value) if type(value).__name__ == "Section" else {name: value}
    return values


def _flags_of(options_class: type) -> type:
    """The same fields without the checks: tyro would frame their one line, and it keeps the line
    breaks of a docstring that is indented.

    The model comes first, then the class's own fields; those of parent classes are sections of the
    help with the class's name ("OptimizationOptions": "optimization options").
    """
    assert dataclasses.is_dataclass(options_class)
    flags = _annotated_fields(options_class)
    own = [*inspect.get_annotations(options_class)]
    if not {*own} - {"json"}:  # a verb that adds nothing to the library's options
        own = [*inspect.get_annotations(options_class.__mro__[1]), *own]
    first = [name for name in ("model", *own) if name in flags]
    fields: list[tuple[str, Any, Any]] = [flags.pop(name) for name in dict.fromkeys(first)]
    for parent in options_class.__mro__[1:]:
        if names := [name for name in inspect.get_annotations(parent) if name in flags]:
            section = dataclasses.make_dataclass("Section", map(flags.pop, names), kw_only=True)
            section.__doc__ = summary(parent)
            title = re.sub("(?<!^)(?=[A-Z])", "_", parent.__name__.removesuffix("Options")).lower()
            made = dataclasses.field(default_factory=section)
            fields.append((title, Annotated[section, tyro.conf.OmitArgPrefixes], made))
    return dataclasses.make_dataclass("Flags", fields, kw_only=True)


def _annotated_fields(options_class: type) -> dict[str, tuple[str, Any, Any]]:
    """Name, annotated type and default of every field, by name."""
    hints, docs = get_type_hints(options_class, include_extras=True), _docs(options_class)
    found: dict[str, tuple[str, Any, Any]] = {}
    aliases, lists = aliases_of(options_class), _lists(options_class)
    for field in dataclasses.fields(options_class):
        hint, own = split_hint(hints[field.name])
        if own and is_typeddict(own[0]):  # the options of decoding
            hint, own = own[0], [tyro.conf.arg(name="")]
        is_optional = NoneType in get_args(hint) and field.default is None
        is_switch = hint is bool
        is_list = field.name in lists
        is_on = is_switch and field.default is True
        hidden = f"(default: --{field.name.replace('_', '-')})" if is_on else ""
        if is_list and field.default is dataclasses.MISSING:
            hidden = "(required)"
        shown = tyro.conf.arg(
            aliases=aliases.get(field.name),
            help=docs.get(field.name),
            metavar=_metavar(field, hint, tyro.conf.Positional in own, is_list),
            help_behavior_hint=hidden if is_optional or is_switch or is_list else None,
        )
        default: Any = dataclasses.field(
            default=field.default, default_factory=field.default_factory
        )
        if is_list:  # the flag may come again: tyro would keep the last one's values alone
            hint = tuple[_without_none(hint), ...]  # type: ignore[misc]
            own, default = [tyro.conf.UseAppendAction, *own], ()
        # A switch that a file of options may turn on needs its --no-; --json comes from no file.
        if field.name == "json":
            own = [tyro.conf.FlagCreatePairsOff, *own]
        # The field's own settings come last: they win.
        found[field.name] = field.name, Annotated[(hint, shown, *own)], default
    return found


def _docs(options_class: type) -> dict[str, str]:
    """The help of each field; that of an option of decoding or of the engine stands with these."""
    docs = {**decoding_docs(), **field_docs(options_class)}
    fields = {field.name for field in dataclasses.fields(options_class)}
    return {name: with_flags(doc, fields) for name, doc in docs.items() if name in fields}


def _metavar(
    field: "dataclasses.Field[object]", hint: object, is_positional: bool, is_list: bool
) -> str | None:
    """What stands for the value in help; None leaves it to tyro."""
    kind = _without_none(hint)
    if is_list and not is_positional:
        word = _METAVARS[get_args(kind)[0]]
        return f"{word} [{word} ...]"
    if is_positional:
        name = field.name.upper()
        return name if field.default is dataclasses.MISSING else f"[{name}]"
    if get_origin(kind) is Literal:  # a choice that may be left out: without "None"
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        return " ".join(_METAVARS[part] for part in get_args(kind) if part is not Ellipsis)
    return _METAVARS.get(kind)


def _without_none(hint: Any) -> Any:
    """The type of a value that is given."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) and len(kinds) == 1 else hint


def _unframe(box: str) -> str:
    """The message of a framed tyro error, with the flag that it thinks was meant.

    The frame is of lines or of blanks and may have colours, depending on where stdout goes.
    """
    sections: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # without the title
        text = _COLOUR.sub("", line).replace("\u2502", " ").rstrip()
        if not text.strip(_RULES):
            sections.append([])
        else:
            sections[-1].append(text)
    message, *hints = [section for section in sections if section] or [["wrong arguments"]]
    said = " ".join(" ".join(message).split()).split(" Got errors:")[0].rstrip(".")
    if said.startswith("Missing from"):
        names = (name.split(", ")[-1] for name in _least_indented(message[1:]))
        said = f"missing: {', '.join(names)}"
    for hint in hints:
        if hint[0].strip().startswith("Perhaps you meant"):
            said += f"; perhaps you meant {hint[1].strip()}"
    said = re.sub(r", 'None'|'None', ", "", said.removeprefix("Error parsing "))
    return said[:1].lower() + said[1:]


def _in_words(said: str, options_class: type, arguments: Sequence[str]) -> str:
    """The parser's sentences as ours: the flag that was typed, its value, what is allowed."""
    if found := re.fullmatch(
        r"invalid choice (.*) for argument '(.*)'. Expected one of (.*)", said
    ):
        value, flag, choices = found.groups()
        known = _in_order(choices.translate(_BRACKETS).strip().split(", "), options_class)
        allowed = f"one of {', '.join(known)}" if known[1:] else known[0]
        return f"{_typed(flag, arguments)} {as_typed(value)} is unknown; use {allowed}"
    for pattern in _NOT_A_NUMBER:
        if found := re.fullmatch(pattern, said):
            kind = "whole number" if re.search("literal for int|INT", said) else "number"
            return f"{_typed(found[1], arguments)} {as_typed(found[2])} must be a {kind}"
    if found := re.fullmatch(r"(\S+): could not parse arguments \[(.*)\] .*", said, re.I):
        return f"{_typed(found[1], arguments)} {as_typed(found[2])} must be numbers"
    if found := re.fullmatch(r"missing value for argument '(.*)'. Expected (\d+) values", said):
        what = "a value" if found[2] == "1" else f"{found[2]} values"
        return f"{_typed(found[1], arguments)} needs {what}"
    if found := re.fullmatch(r"unrecognized options: (.*?)(; perhaps.*)?", said):
        words = found[1].split(", ")
        unknown = [word for word in words if word.startswith("-")] or words
        return f"unrecognized options: {', '.join(unknown)}{found[2] or ''}"
    return said


def _typed(flag: str, arguments: Sequence[str]) -> str:
    """Which of a flag's spellings (--temp/--temperature) was typed."""
    typed = (argument.partition("=")[0] for argument in arguments)
    return next((one for one in typed if one in flag.split("/")), flag.split("/")[-1])


def _in_order(choices: list[str], options_class: type) -> list[str]:
    """Choices as the option's type lists them; the parser has some of them in no order."""
    for hint in flag_types(options_class).values():
        for part in (hint, *get_args(hint)):
            if get_origin(part) is Literal and set(map(str, get_args(part))) == set(choices):
                return [str(choice) for choice in get_args(part)]
    return choices


def _least_indented(lines: list[str]) -> list[str]:
    """The names in a list whose explanations are indented more."""
    indents = [len(line) - len(line.lstrip()) for line in lines]
    return [
        line.strip() for line, indent in zip(lines, indents, strict=True) if indent == min(indents)
    ]
