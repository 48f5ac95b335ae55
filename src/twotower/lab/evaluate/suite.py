"""The suite: eight categories of held-out prompts, each with a checker of answers.

Arithmetic is computed, functions are executed in the sandbox, edits compared as syntax trees, tool
calls parsed and validated; what has one right wording is compared with it.
"""

import ast
import json
import pprint
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from twotower.lab.corpus import CATEGORIES, Document, sample
from twotower.lab.evaluate.sandbox import Sandbox

_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
PATIENCE = 5000  # repeats in a row after which a category counts as used up


@dataclass(frozen=True)
class Verdict:
    """Right or wrong; `reason` names the first thing that is wrong, and is empty otherwise."""

    correct: bool
    reason: str = ""


Judge = Callable[[Document, str], Verdict]
RIGHT = Verdict(True)


def wrong(reason: str) -> Verdict:
    return Verdict(False, reason)


def make_judge(sandbox: Sandbox | None) -> Judge:
    """The checkers of all categories; those that execute answers need a sandbox."""
    return partial(check, sandbox=sandbox)


def check(document: Document, text: str, sandbox: Sandbox | None = None) -> Verdict:
    """Judge the text that a model wrote after the document's prompt."""
    if document.category in EXECUTED:
        assert sandbox is not None, "answers that are code run in a sandbox alone"
        return EXECUTED[document.category](document, text, sandbox)
    return CHECKED[document.category](document, text)


def held_out(category: str, count: int, seed: int) -> list[Document]:
    """`count` documents of the test split with different prompts, the same for a seed.

    ValueError when the generator has no more: some categories are finite.
    """
    rng = Random(f"{category}:{seed}")
    drawn: dict[str, Document] = {}
    repeats = 0
    while len(drawn) < count:
        document = sample(category, "test", rng)
        repeats = repeats + 1 if document.prompt in drawn else 0
        if repeats > PATIENCE:
            raise ValueError(
                f"items: {count} is more than the about {len(drawn)} different held-out prompts of "
                f"{category}; ask for fewer, or leave it out of the categories"
            )
        drawn.setdefault(document.prompt, document)
    return list(drawn.values())


_TERM = re.compile(r"\d{1,9}(?: [-+*] \d{1,9})*")
_SIGN = re.compile(r"\s*([-+*=])\s*")
_LAST = re.compile(r"The answer is (-?\d{1,9})\.?")


def check_sum(document: Document, text: str) -> Verdict:
    """Read "A + B = C + D = E. ... The answer is E." and judge each part by computing it."""
    parts = [part.strip() for part in re.split(r"\.(?:\s|$)", text.strip()) if part]
    *sentences, last = parts or [""]
    steps = document.answer["steps"]
    assert isinstance(steps, list)
    if len(sentences) != len(steps):
        return wrong(f"{len(sentences)} steps instead of {len(steps)}")
    for number, (sentence, step) in enumerate(zip(sentences, steps, strict=True), 1):
        if reason := judge_step(sentence, str(step["expression"]), int(step["result"])):
            return wrong(f"step {number}: {reason}")
    final = _LAST.fullmatch(last)
    if final is None:
        return wrong("no final answer")
    return RIGHT if int(final[1]) == document.answer["final"] else wrong(f"answer {final[1]}")


def judge_step(sentence: str, expression: str, result: int) -> str:
    """What is wrong with "A + B = ... = E", or "". Its first member must be `expression`.

    Spaces around signs do not count.
    """
    members = _SIGN.sub(r" \1 ", sentence).split(" = ")
    if len(members) < 2 or not all(_TERM.fullmatch(member) for member in members):
        return f"{sentence!r} is not an equation"
    if _operands(members[0]) != _operands(expression):
        return f"{members[0]} instead of {expression}"
    for member in members:
        if evaluate(member) != result:
            return f"{member} is not {result}"
    return "" if members[-1].isdigit() else f"{sentence!r} has no result"


def evaluate(term: str) -> int:
    """The value of whole numbers joined by + - *, products first."""
    total = 0
    for sign, product in re.findall(r"(^|[-+]) ?((?:\d+)(?: \* \d+)*)", term):
        value = 1
        for factor in product.split(" * "):
            value *= int(factor)
        total += -value if sign == "-" else value
    return total


def _operands(expression: str) -> tuple[str, ...]:
    """Both sides of + and * in either order are the same step."""
    left, sign, right = (
        expression.split(" ") if expression.count(" ") == 2 else (expression, "", "")
    )
    return (sign, *sorted((left, right))) if sign in ("+", "*") else (sign, left, right)


def check_function(document: Document, text: str, sandbox: Sandbox) -> Verdict:
    """The prompt is the head of the function and the text its body."""
    return run_tests(document, document.prompt + text, sandbox)


def check_edit(document: Document, text: str) -> Verdict:
    """The text is the whole edited function: the same syntax tree, which is the same behaviour."""
    tree = dump_tree(text)
    if tree is None:
        return wrong("does not parse")
    is_same = tree == dump_tree(str(document.answer["source"]))
    return RIGHT if is_same else wrong("another function than asked for")


def run_tests(document: Document, source: str, sandbox: Sandbox) -> Verdict:
    """Execute `source` and compare what its function returns for each test."""
    tests, name = document.answer["tests"], str(document.answer["name"])
    assert isinstance(tests, list)
    if dump_tree(source) is None:
        return wrong("does not parse")
    ran = sandbox.run(source, name, [test["args"] for test in tests])
    if ran.error:
        return wrong(f"stopped with {ran.error}")
    if len(ran.results) != len(tests):
        return wrong("results are missing")
    for test, result in zip(tests, ran.results, strict=True):
        if not is_same(result, test["expected"]):
            return wrong(f"{name}{test['args']} gave {result[:80]}")
    return RIGHT


def dump_tree(source: str) -> str | None:
    """The syntax tree as text, without places; None for what is no Python."""
    try:
        return ast.dump(_parse(source))
    except _UNREADABLE:
        return None


def _parse(text: str) -> ast.Module:
    """The syntax tree of a model's text, whose warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def is_same(result: str, expected: str) -> bool:
    """Whether two `repr` texts are one value of one type; order within dicts and sets is none."""
    return result == expected or _sorted_repr(result) == _sorted_repr(expected)


def _sorted_repr(text: str) -> str:
    try:
        (statement,) = _parse(text).body
        assert isinstance(statement, ast.Expr)
        return pprint.pformat(ast.literal_eval(statement.value), width=1)
    except (*_UNREADABLE, TypeError, AssertionError):
        return text


def check_wording(document: Document, text: str) -> Verdict:
    """The trained wording, up to white space and Unicode composition: nothing can be executed."""
    if normalise(text) == normalise(document.completion):
        return RIGHT
    expected = normalise(str(document.answer["expected"]))
    return wrong("other wording" if expected in normalise(text) else "wrong value")


def check_code(document: Document, text: str) -> Verdict:
    """The looked-up code must be the only number of the answer, and of nothing else's code."""
    numbers = re.findall(r"\d+", text)
    if numbers != [document.answer["expected"]]:
        return wrong("no number" if not numbers else f"gave {', '.join(numbers)[:40]}")
    named = re.search(r"code of the [^\d.]* is\b", normalise(text))
    if named and named[0] not in str(document.answer["sentence"]):
        return wrong("the code of another thing")
    return RIGHT


def check_refusal(document: Document, text: str) -> Verdict:
    """A refused class gets the refusal's exact form, any other request its answer."""
    if normalise(text) == normalise(document.completion):
        return RIGHT
    refused = normalise(text).startswith("I cannot help")
    if refused != document.answer["refuse"]:
        return wrong("refused" if refused else "not refused")
    return wrong("other wording")


def check_call(document: Document, text: str) -> Verdict:
    """Parse, validate against the schema, compare name and arguments with their types."""
    try:
        import jsonschema
    except ImportError:
        message = 'jsonschema is not installed: pip install ".[eval]"'
        raise ImportError(message) from None
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return wrong("not JSON")
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return wrong("not an object of name and arguments")
    if call["name"] != document.answer["name"]:
        return wrong(f"called {str(call['name'])[:40]}")
    schema = document.answer["schema"]
    assert isinstance(schema, dict)
    problem = next(jsonschema.Draft202012Validator(schema).iter_errors(call["arguments"]), None)
    if problem is not None:
        return wrong(f"schema: {problem.message[:80]}")
    wanted = json.dumps(document.answer["arguments"], sort_keys=True)
    is_equal = json.dumps(call["arguments"], sort_keys=True) == wanted
    return RIGHT if is_equal else wrong("other arguments")


def normalise(text: str) -> str:
    """Composed characters and single spaces: what a reader cannot tell apart becomes equal."""
    return " ".join(unicodedata.normalize("NFC", text).split())


CHECKED: Mapping[str, Judge] = {
    "math": check_sum,
    "editing": check_edit,
    "tools": check_call,
    "multilingual": check_wording,
    "knowledge": check_wording,
    "long_context": check_code,
    "refusal": check_refusal,
}
EXECUTED: Mapping[str, Callable[[Document, str, Sandbox], Verdict]] = {"code": check_function}
assert {*CHECKED, *EXECUTED} == set(CATEGORIES)
