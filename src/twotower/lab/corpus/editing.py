"""Edits of a short function by an instruction; the completion is the whole edited function.

The functions, before and after a change of constants, come from the training split of the code
category, so that an edit never shows the body of a held-out function. The key is the kind, what
the instruction names, and the function.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from twotower.lab.corpus.code import (
    FAMILIES,
    NAMES_OF,
    TAGS,
    WrittenFunction,
    draw_constants,
    draw_function,
    make_tests,
)
from twotower.lab.corpus.document import Draft, split_of, word_list

Edit = tuple[str, str, str]  # instruction, edited source, name of the edited function
NEW_NAMES = tuple(
    f"{verb}_{noun}"
    for verb in word_list("get make find check run do select compute")
    for noun in word_list("result items value list answer data output it")
)
COMPARISONS = (">", "<", ">=", "<=", "==", "!=")
NEW_ARGUMENTS = ("limit", "step", "mode", "depth", "scale", "offset", "start", "key")
TYPES = {"numbers": "list", "words": "list", "text": "str", "number": "int", "table": "dict"}


def _rename_function(function: WrittenFunction, rng: Random) -> Edit | None:
    name = rng.choice(NEW_NAMES)
    source = function.source.replace(f"def {function.name}(", f"def {name}(")
    return f"Rename the function to {name}.", source, name


def _rename_argument(function: WrittenFunction, rng: Random) -> Edit | None:
    choices = [name for name in NAMES_OF[function.family.argument] if name != function.variables]
    old, new = function.variables.split(", "), rng.choice(choices).split(", ")
    if set(old) & set(new):
        return None
    changed = replace(function, variables=", ".join([new[0], *old[1:]]))
    if split_of("code", changed.key) == "test":
        return None
    return f"Rename {old[0]} to {new[0]}.", changed.source, function.name


def _change_constant(function: WrittenFunction, rng: Random) -> Edit | None:
    if not function.constants:
        return None
    place = rng.randrange(len(function.constants))
    new = draw_constants(function.family, rng)[place]
    old = function.constants[place]
    constants = (*function.constants[:place], new, *function.constants[place + 1 :])
    changed = replace(function, constants=constants)
    numeric = old.isdigit()
    written, wanted = (old, new) if numeric else (f'"{old}"', f'"{new}"')
    pattern = rf"\b{old}\b" if numeric else re.escape(written)
    by_text = re.sub(pattern, lambda _: wanted, function.source)
    # Text and meaning must agree: an ambiguous "Change 5 to 9" is not a fair instruction.
    if new in function.constants or by_text != changed.source:
        return None
    if split_of("code", changed.key) == "test":
        return None
    return f"Change {written} to {wanted}.", changed.source, function.name


def _is_held_out(function: WrittenFunction, body: str) -> bool:
    """Tell whether another operator made this body the answer to a held-out code item."""
    for family in FAMILIES:
        if family.argument == function.family.argument:
            other = replace(function, family=family)
            if other.body == body and split_of("code", other.key) == "test":
                return True
    return False


def _change_operator(function: WrittenFunction, rng: Random) -> Edit | None:
    found = re.findall(r" ([<>]=?|[!=]=) ", function.body)
    return _change_sign(function, found[0], COMPARISONS, rng) if len(found) == 1 else None


def _change_arithmetic(function: WrittenFunction, rng: Random) -> Edit | None:
    if function.family.argument not in ("numbers", "number", "pair"):
        return None
    found = re.findall(r"\b\w+ ([-+*]) \d", function.body)
    if len(found) != 1 or function.body.count(f" {found[0]} ") != 1:
        return None
    return _change_sign(function, found[0], "+-*", rng)


def _change_sign(
    function: WrittenFunction, old: str, signs: Sequence[str], rng: Random
) -> Edit | None:
    new = rng.choice([sign for sign in signs if sign != old])
    body = function.body.replace(f" {old} ", f" {new} ")
    if _is_held_out(function, body):
        return None
    return f"Change {old} to {new}.", f"{function.head}\n{body}", function.name


def _add_default(function: WrittenFunction, rng: Random) -> Edit | None:
    name = function.variables.split(", ")[-1]
    if function.family.argument in ("number", "pair"):
        default = str(rng.randint(0, 99))
    elif function.family.argument == "text":
        default = f'"{rng.choice(TAGS)}"'
    else:
        default = "None"
    source = function.source.replace(f"{name}):", f"{name}={default}):", 1)
    return f"Give {name} the default {default}.", source, function.name


def _wrap_result(function: WrittenFunction, rng: Random) -> Edit | None:
    if "\n" in function.body or not function.body.startswith("    return "):
        return None
    wrapper = rng.choice(("str", "repr", "bool"))
    value = function.body.removeprefix("    return ")
    source = f"{function.head}\n    return {wrapper}({value})"
    return f"Wrap the result in {wrapper}().", source, function.name


def _change_result(function: WrittenFunction, rng: Random) -> Edit | None:
    match = re.search(r'return (None|-1|"high"|"low")$', function.body, re.MULTILINE)
    if match is None:
        return None
    old = match.group(1)
    new = f'"{rng.choice(TAGS)}"' if old.startswith('"') else str(rng.randint(0, 99))
    source = function.source.replace(f"return {old}", f"return {new}")
    return f"Return {new} instead of {old}.", source, function.name


def _add_docstring(function: WrittenFunction, rng: Random) -> Edit | None:
    verb, noun = rng.choice(("Compute", "Return", "Make", "Find")), rng.choice(TAGS)
    text = f"{verb} the {noun} {rng.choice(('list', 'value', 'result', 'number', 'name'))}."
    source = f'{function.head}\n    """{text}"""\n{function.body}'
    return f'Add the docstring "{text}"', source, function.name


def _add_first_line(function: WrittenFunction, rng: Random) -> Edit | None:
    name = function.variables.split(", ")[0]
    number, tag = rng.randint(2, 99), rng.choice(TAGS)
    values = {
        "numbers": (f"{name} + [{number}]", f"sorted({name})", f"{name}[1:]"),
        "words": (f'{name} + ["{tag}"]', f"sorted({name})", f"{name}[1:]"),
        "text": (f'{name} + "{tag}"', f"{name}.strip()", f"{name}.lower()"),
        "number": (f"{name} + {number}", f"{name} - {number}", f"abs({name})"),
        "pair": (f"{name} + {number}", f"{name} - {number}", f"abs({name})"),
        "table": (f"dict({name})", f'{name} | {{"{tag}": {number}}}'),
    }
    line = f"{name} = {rng.choice(values[function.family.argument])}"
    source = f"{function.head}\n    {line}\n{function.body}"
    return f"Add the first line {line}", source, function.name


def _add_argument(function: WrittenFunction, rng: Random) -> Edit | None:
    argument = f"{rng.choice(NEW_ARGUMENTS)}={rng.randint(0, 99)}"
    source = function.source.replace(
        f"({function.variables}):", f"({function.variables}, {argument}):", 1
    )
    return f"Add the argument {argument}.", source, function.name


def _annotate(function: WrittenFunction, rng: Random) -> Edit | None:
    if function.family.argument == "pair":
        return None
    name, kind = function.variables, TYPES[function.family.argument]
    source = function.source.replace(f"({name}):", f"({name}: {kind}):", 1)
    return f"Annotate {name} as {kind}.", source, function.name


KINDS: tuple[tuple[str, Callable[[WrittenFunction, Random], Edit | None]], ...] = (
    ("rename_function", _rename_function),
    ("rename_argument", _rename_argument),
    ("rename_argument", _rename_argument),
    ("change_constant", _change_constant),
    ("change_constant", _change_constant),
    ("change_operator", _change_operator),
    ("change_arithmetic", _change_arithmetic),
    ("add_default", _add_default),
    ("wrap_result", _wrap_result),
    ("change_result", _change_result),
    ("add_docstring", _add_docstring),
    ("add_first_line", _add_first_line),
    ("add_argument", _add_argument),
    ("annotate", _annotate),
)


def draw(rng: Random) -> Draft:
    """Draw one edit; the answer holds the edited source, its function name and tests on it."""
    kind, edit = rng.choice(KINDS)
    while True:
        function = draw_function(rng)
        made = edit(function, rng) if split_of("code", function.key) == "train" else None
        if made is not None:
            break
    instruction, source, name = made
    return Draft(
        key=f"{kind}: {instruction} {function.key}",
        prompt=f"Edit: {instruction}\n{function.source}\nEdited:\n",
        completion=source,
        answer=lambda: {
            "kind": kind,
            "name": name,
            "source": source,
            "tests": make_tests(function, source, name),
        },
    )
