"""The mixture: documents of one category, and the endless stream that training reads."""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from random import Random
from typing import get_args

from twotower.lab.corpus import (
    answered,
    arithmetic,
    code,
    editing,
    knowledge,
    long_context,
    multilingual,
    refusal,
    tools,
)
from twotower.lab.corpus.document import Document, Draft, Split, split_of

DRAWS: dict[str, Callable[[Random], Draft]] = {
    "math": arithmetic.draw,
    "code": code.draw,
    "editing": editing.draw,
    "tools": tools.draw,
    "multilingual": multilingual.draw,
    "knowledge": knowledge.draw,
    "long_context": long_context.draw,
    "refusal": refusal.draw,
    "lookup": long_context.draw_lookup,
    "answered": answered.draw,
    "math_with_tools": answered.with_tools(arithmetic.draw),
    "refusal_with_tools": answered.with_tools(refusal.draw),
}
# "lookup" teaches what "long_context" measures, in short documents; others teach not to call tools.
TAUGHT_ALONE = ("lookup", "answered", "math_with_tools", "refusal_with_tools")
CATEGORIES: tuple[str, ...] = tuple(name for name in DRAWS if name not in TAUGHT_ALONE)
# Long documents need long rows: a run of their own, with weights that name them.
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "math": 0.21,
    "code": 0.10,
    "editing": 0.17,
    "tools": 0.13,
    "multilingual": 0.17,
    "knowledge": 0.06,
    "refusal": 0.06,
    "lookup": 0.04,
    "answered": 0.04,
    "math_with_tools": 0.01,
    "refusal_with_tools": 0.01,
}


def sample(category: str, split: Split, rng: Random) -> Document:
    """Draw one document of the split: drafts whose key belongs to the other split are redrawn.

    Raises ValueError for an unknown category or split.
    """
    if category not in DRAWS:
        raise ValueError(f"category={category!r} is unknown; use one of {', '.join(DRAWS)}")
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is unknown; use 'train' or 'test'")
    draw = DRAWS[category]
    while True:
        draft = draw(rng)
        if split_of(category, draft.key) == split:
            return Document(
                category=category,
                prompt=draft.prompt,
                completion=draft.completion,
                key=draft.key,
                answer=draft.answer(),
            )


def documents(
    split: Split, seed: int, weights: Mapping[str, float] | None = None
) -> Iterator[Document]:
    """Yield documents without end, the same for a seed in every process.

    `weights` are relative and by category; categories that it leaves out get none.
    Raises ValueError for an unknown category, a negative weight or a sum of zero.
    """
    chosen = DEFAULT_WEIGHTS if weights is None else weights
    for category, weight in chosen.items():
        if category not in DRAWS:
            known = ", ".join(DRAWS)
            raise ValueError(f"weights: category {category!r} is unknown; use some of {known}")
        if not weight >= 0:
            raise ValueError(f"weights[{category!r}]={weight} must be 0 or more")
    shares = list(accumulate(chosen.get(category, 0.0) for category in DRAWS))
    if shares[-1] <= 0:
        raise ValueError("weights sum to 0; give at least one category a positive weight")
    return _stream(split, Random(f"{split}:{seed}"), shares)


def _stream(split: Split, rng: Random, shares: list[float]) -> Iterator[Document]:
    while True:
        (category,) = rng.choices(tuple(DRAWS), cum_weights=shares)
        yield sample(category, split, rng)
