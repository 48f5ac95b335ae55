"""Answers with one right wording: translations, facts, looked-up codes, refusals."""

import re

from twotower.lab.corpus import Document
from twotower.lab.evaluate.suite.verdict import RIGHT, Verdict, normalise, wrong


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
