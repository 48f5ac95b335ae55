"""The suite: eight categories, each with a checker that runs or parses the answer where it can."""

from collections.abc import Callable, Mapping
from random import Random

from twotower.lab.corpus import Document, sample
from twotower.lab.evaluate.suite import mathematics, python_code, statements, tool_calls
from twotower.lab.evaluate.suite.verdict import Verdict

Check = Callable[[Document, str], Verdict]
CHECKS: Mapping[str, Check] = {
    "math": mathematics.check,
    "code": python_code.check_function,
    "editing": python_code.check_edit,
    "tools": tool_calls.check,
    "multilingual": statements.check_wording,
    "knowledge": statements.check_wording,
    "long_context": statements.check_code,
    "refusal": statements.check_refusal,
}
PATIENCE = 5000  # repeats in a row after which a category counts as used up
SUITES: Mapping[str, tuple[str, ...]] = {"mini": tuple(CHECKS)}

__all__ = ["CHECKS", "SUITES", "Check", "Verdict", "check", "held_out"]


def check(document: Document, text: str) -> Verdict:
    """Judge the text that a model wrote after the document's prompt."""
    return CHECKS[document.category](document, text)


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
