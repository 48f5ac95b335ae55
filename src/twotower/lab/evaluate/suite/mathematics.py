"""Worked sums: every equation must hold, every step be the problem's, and the answer right."""

import re

from twotower.lab.corpus import Document
from twotower.lab.evaluate.suite.verdict import RIGHT, Verdict, wrong

_TERM = re.compile(r"\d{1,9}(?: [-+*] \d{1,9})*")
_SIGN = re.compile(r"\s*([-+*=])\s*")
_LAST = re.compile(r"The answer is (-?\d{1,9})\.?")


def check(document: Document, text: str) -> Verdict:
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
        return f"{sentence!r} is no equation"
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
