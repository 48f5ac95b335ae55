"""The docstrings under the fields of a dataclass: for `help`, and for the command line's flags."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def field_docs(options_class: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line; {} without its source."""
    docs: dict[str, str] = {}
    for parent in reversed(options_class.__mro__[1:]):  # the nearest wins
        if dataclasses.is_dataclass(parent):
            docs |= field_docs(parent)
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(options_class))).body
    except OSError:
        return docs
    assert isinstance(body, ast.ClassDef)
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match doc:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[field.target.id] = " ".join(text.split())
    return docs


def documented(options_class: type[T], defaults: Mapping[str, object] | None = None) -> type[T]:
    """The class, whose `help` explains every field; defaults: of fields that have None there."""
    given = {n: value for n, value in (defaults or {}).items() if value not in (None, ())}
    ends = {name: f" Default: {value!r}." for name, value in given.items()}
    docs = field_docs(options_class)
    lines = [f"{name}: {doc}{ends.get(name, '')}" for name, doc in docs.items()]
    filled = (textwrap.fill(line, 96, subsequent_indent="    ") for line in lines)
    options_class.__doc__ = f"{inspect.getdoc(options_class)}\n\n" + "\n".join(filled)
    return options_class


def summary(options_class: type) -> str:
    """The docstring of a class without what `documented` has added, on one line a paragraph."""
    text = inspect.getdoc(options_class) or ""
    first = next(iter(field_docs(options_class)), "")
    own = text.partition(f"\n\n{first}: ")[0]
    return "\n\n".join(" ".join(part.split()) for part in own.split("\n\n"))
