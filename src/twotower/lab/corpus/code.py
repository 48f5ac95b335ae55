"""Short Python functions from a one-line comment, with tests made by running the reference.

The key is the family and its constants; families without constants use the argument name instead,
so that the function itself is still seen in training.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal, get_args

from twotower.lab.corpus.document import Draft, entries, word_list

LETTERS = "abcdefghiklmnoprstuvw"
MARKS = (",", ", ", "-", " ", ";", ":", "/", "_", ".", "+", "|", " - ")
TAGS = word_list(
    "cat dog tea pen cup map key box red blue gold milk rice salt corn fish bird tree lake hill "
    "end new old big top one two six ten day"
)


Argument = Literal["numbers", "words", "text", "number", "pair", "table"]


@dataclass(frozen=True)
class FunctionFamily:
    """One kind of function: names to choose from, the argument, constants, comment and body."""

    names: str
    argument: Argument
    constants: str
    comment: str
    body: str


NAMES_OF: dict[Argument, tuple[str, ...]] = {
    "numbers": ("xs", "items", "values", "numbers", "nums", "data"),
    "words": ("words", "names", "tokens", "strings", "lines", "parts"),
    "text": ("s", "text", "word", "line", "name", "title"),
    "number": ("n", "num", "value", "size", "count", "k"),
    "pair": ("a, b", "p, q", "m, n", "i, j", "left, right", "first, last"),
    "table": ("d", "table", "prices", "scores", "ages", "stock"),
}

FAMILIES = tuple(
    FunctionFamily(names, argument, constants, comment, "\n".join(body))
    for argument in get_args(Argument)
    for (names, constants, comment), body in entries("functions", argument)
)


@dataclass(frozen=True, kw_only=True)
class WrittenFunction:
    """A family with its names and constants chosen."""

    family: FunctionFamily
    name: str
    variables: str
    constants: tuple[str, ...]

    def fill(self, template: str) -> str:
        """Put variables and constants into a comment or body template."""
        names = self.variables.split(", ")
        text = template.replace("{v}", names[0]).replace("{w}", names[-1])
        for place, value in zip(("{c}", "{d}"), self.constants, strict=False):
            text = text.replace(place, value)
        return text

    @property
    def key(self) -> str:
        """FunctionFamily and constants, without the names that do not change what is asked."""
        family = self.family.names.split()[0]
        return f"{family}({', '.join(self.constants) or self.variables})"

    @property
    def comment(self) -> str:
        return self.fill(self.family.comment)

    @property
    def head(self) -> str:
        return f"def {self.name}({self.variables}):"

    @property
    def body(self) -> str:
        return self.fill(self.family.body)

    @property
    def source(self) -> str:
        return f"{self.head}\n{self.body}"


def _constant(kind: str, rng: Random) -> str:
    if kind == "num":
        return str(rng.randint(3, 20) if rng.random() < 0.4 else rng.randint(3, 99))
    if kind == "small":
        return str(rng.randint(2, 9))
    return rng.choice({"letter": LETTERS, "mark": MARKS, "tag": TAGS}[kind])


def draw_constants(family: FunctionFamily, rng: Random) -> tuple[str, ...]:
    """Draw a family's constants: different ones, two numbers in ascending order."""
    kinds = family.constants.split() if family.constants != "-" else []
    values = [_constant(kind, rng) for kind in kinds]
    while len(set(values)) < len(values):
        values = [_constant(kind, rng) for kind in kinds]
    return tuple(sorted(values, key=int) if kinds == ["num", "num"] else values)


def draw_function(rng: Random) -> WrittenFunction:
    """Draw a function: family first, so that every family is equally frequent."""
    family = rng.choice(FAMILIES)
    return WrittenFunction(
        family=family,
        name=rng.choice(family.names.split()),
        variables=rng.choice(NAMES_OF[family.argument]),
        constants=draw_constants(family, rng),
    )


def arguments_for(argument: Argument, constants: tuple[str, ...]) -> list[list[object]]:
    """Return argument lists that reach both sides of every constant of the function."""
    edges = [int(value) for value in constants if value.isdigit()] or [10]
    tags = [value for value in constants if not value.isdigit()] or ["a"]
    low, high = edges[0], edges[-1]
    near = [low - 1, low, low + 1, high + 5]
    strings = ["", "level", f"{tags[0]}bc{tags[0]}", "one, two - three/four"]
    texts: list[list[object]] = [[text] for text in strings[:3]]
    cases: dict[Argument, list[list[object]]] = {
        "numbers": [[[]], [near], [[3, high, 2 * low, -4, 7]], [list(range(1, 11))], [[low + 1]]],
        "words": [[[]], [strings], [["tea", tags[0] + "x", "a" * (low + 1)]], [["pear", "fig"]]],
        "text": [*texts, [("abcdefghijklm" * 8)[: low + 3]]],
        "number": [[0], [low], [low + 1], [high + 5]],
        "pair": [[0, 1], [low, low], [high + 1, low + 2], [3, high * 2]],
        "table": [[{}], [{tags[0]: low + 1, "b": low}], [{"x": 1, "y": high + 1}], [{"c": 12}]],
    }
    return cases[argument]


@lru_cache(maxsize=1 << 14)
def _expected(
    source: str, name: str, argument: Argument, constants: tuple[str, ...]
) -> list[dict[str, str]]:
    scope: dict[str, object] = {}
    exec(source, scope)  # our own text from the table above, never a model's
    function = scope[name]
    assert callable(function)
    tests: list[dict[str, str]] = []
    for values in arguments_for(argument, constants):
        given = copy.deepcopy(values)
        tests.append({"args": repr(values), "expected": repr(function(*given))})
    return tests


def make_tests(function: WrittenFunction, source: str, name: str) -> list[dict[str, str]]:
    """Run `source`; a test has Python literals, as JSON would turn integer keys into strings."""
    return list(_expected(source, name, function.family.argument, function.constants))


def draw(rng: Random) -> Draft:
    """Draw one function; the answer holds its name, the reference source and the tests."""
    function = draw_function(rng)
    return Draft(
        key=function.key,
        # The newline opens the completion: with the indent it is one token, which a prompt that
        # ends with a newline would cut in two.
        prompt=f"# {function.comment}\n{function.head}",
        completion=f"\n{function.body}",
        answer=lambda: {
            "name": function.name,
            "source": function.source,
            "tests": make_tests(function, function.source, function.name),
        },
    )
