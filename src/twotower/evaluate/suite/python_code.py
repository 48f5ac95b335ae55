"""Functions and edits of functions: executed on the item's tests; an edit's tree must be equal."""

import ast

from twotower.corpus import Document
from twotower.evaluate.sandbox import run_function
from twotower.evaluate.suite.verdict import RIGHT, Verdict, wrong


def check_function(document: Document, text: str) -> Verdict:
    """The prompt is the head of the function and the text its body."""
    return run_tests(document, document.prompt + text)


def check_edit(document: Document, text: str) -> Verdict:
    """The text is the whole edited function: the same syntax tree and the same behaviour."""
    try:
        tree = ast.dump(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return wrong("does not parse")
    if tree != ast.dump(ast.parse(str(document.answer["source"]))):
        return wrong("another function than asked for")
    return run_tests(document, text)


def run_tests(document: Document, source: str) -> Verdict:
    """Execute `source` and compare what its function returns for each test."""
    tests, name = document.answer["tests"], str(document.answer["name"])
    assert isinstance(tests, list)
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return wrong("does not parse")
    ran = run_function(source, name, [test["args"] for test in tests])
    if ran.error:
        return wrong(f"stopped with {ran.error}")
    if len(ran.results) != len(tests):
        return wrong("results are missing")
    for test, result in zip(tests, ran.results, strict=True):
        if result != test["expected"]:
            return wrong(f"{name}{test['args']} gave {result[:80]}")
    return RIGHT
