"""Options as their users meet them: a docstring under each field, for `help` and for the command
line's flags, and one line for a field that they do not have.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import TypeVar

from twotower.arguments import nearest

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


def public_options(options_class: type[T], defaults: Mapping[str, object] | None = None) -> type[T]:
    """The class, whose `help` explains every field, and which says in one line (ValueError) that a
    field is unknown or missing; defaults: of fields that have None there.
    """
    given = {n: value for n, value in (defaults or {}).items() if value not in (None, ())}
    ends = {name: f" Default: {value!r}." for name, value in given.items()}
    docs = field_docs(options_class)
    lines = [f"{name}: {doc}{ends.get(name, '')}" for name, doc in docs.items()]
    filled = (textwrap.fill(line, 96, subsequent_indent="    ") for line in lines)
    options_class.__doc__ = f"{inspect.getdoc(options_class)}\n\n" + "\n".join(filled)
    _name_fields(options_class)
    return options_class


def _name_fields(options_class: type) -> None:
    """Let the class's constructor name the fields that it was not called with as it wants."""
    name, made = options_class.__name__, getattr(options_class, "__init__")  # noqa: B009
    unset = dataclasses.MISSING
    fields = {
        field.name: field.default is unset and field.default_factory is unset
        for field in dataclasses.fields(options_class)
    }

    @functools.wraps(made)
    def construct(self: object, *args: object, **values: object) -> None:
        if args:
            raise ValueError(f"{name}: give its fields by name, as in {next(iter(fields))}=...")
        for field in values:
            if field not in fields:
                remedy = f"{nearest(field, fields)}; see help({name})"
                raise ValueError(f"{field}: {name} has no such field{remedy}")
        for field, is_required in fields.items():
            if is_required and field not in values:
                raise ValueError(f"{field}: missing; see help({name})")
        made(self, **values)

    options_class.__init__ = construct  # type: ignore[misc]


def summary(options_class: type) -> str:
    """The docstring of a class without what `public_options` has added, on one line a paragraph."""
    text = inspect.getdoc(options_class) or ""
    first = next(iter(field_docs(options_class)), "")
    own = text.partition(f"\n\n{first}: ")[0]
    return "\n\n".join(" ".join(part.split()) for part in own.split("\n\n"))
