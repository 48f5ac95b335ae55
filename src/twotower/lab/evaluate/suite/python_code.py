"""Functions and edits of functions: executed on the item's tests; an edit's tree must be equal."""

import ast
import pprint
import warnings

from twotower.lab.corpus import Document
from twotower.lab.evaluate.sandbox import run_function
from twotower.lab.evaluate.suite.verdict import RIGHT, Verdict, wrong


def check_function(document: Document, text: str) -> Verdict:
    """The prompt is the head of the function and the text its body."""
    return run_tests(document, document.prompt + text)


def check_edit(document: Document, text: str) -> Verdict:
    """The text is the whole edited function: the same syntax tree and the same behaviour."""
    tree = dump_tree(text)
    if tree is None:
        return wrong("does not parse")
    if tree != dump_tree(str(document.answer["source"])):
        return wrong("another function than asked for")
    return run_tests(document, text)


def run_tests(document: Document, source: str) -> Verdict:
    """Execute `source` and compare what its function returns for each test."""
    tests, name = document.answer["tests"], str(document.answer["name"])
    assert isinstance(tests, list)
    if dump_tree(source) is None:
        return wrong("does not parse")
    ran = run_function(source, name, [test["args"] for test in tests])
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a model's text, not about ours
        try:
            return ast.dump(ast.parse(source))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def is_same(result: str, expected: str) -> bool:
    """Whether two `repr` texts are one value of one type; order within dicts and sets is none."""
    return result == expected or _sorted_repr(result) == _sorted_repr(expected)


def _sorted_repr(text: str) -> str:
    try:
        return pprint.pformat(ast.literal_eval(text), width=1)
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
        return text
