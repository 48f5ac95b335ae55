"""Flags from an options dataclass of the library, of which only those that were given come back.

Types, help and defaults are read from the dataclass, where they are written once.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Collection
from types import NoneType
from typing import Annotated, Literal, TypedDict, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec


def field_docs(options_class: type) -> dict[str, str]:
    """The docstring under each field, on one line."""
    docs: dict[str, str] = {}
    for parent in options_class.__mro__[1:]:
        if dataclasses.is_dataclass(parent):
            docs |= field_docs(parent)
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(options_class))).body
    assert isinstance(body, ast.ClassDef)
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match doc:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[field.target.id] = " ".join(text.split())
    return docs


def optional_flags(options_class: type, leave_out: Collection[str] = ()) -> type:
    """A dictionary type with the fields of a dataclass, none of them required, for tyro to fill."""
    hints, docs = get_type_hints(options_class), field_docs(options_class)
    flags: dict[str, object] = {}
    for field in dataclasses.fields(options_class):
        if field.name not in leave_out:
            shown = tyro.conf.arg(
                help=docs[field.name], help_behavior_hint=f"(default: {_spell(field.default)})"
            )
            hint = hints[field.name]
            specs = [_alternatives(hint)] if NoneType in get_args(hint) else []
            flags[field.name] = Annotated[(hint, *specs, shown)]
    # Made at run time, so there is nothing for a type checker to see.
    return TypedDict("decoding", flags, total=False)  # type: ignore[operator, no-any-return]


def _spell(value: object) -> str:
    return "none" if value is None else str(value)


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
        raise ValueError(f"{text!r} is not {metavar}")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_spell(value)],
    )
