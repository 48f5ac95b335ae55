"""The mixture: documents of one category, and the endless stream that training reads."""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from random import Random
from typing import get_args

from twotower.corpus import arithmetic, code, edits, facts, tools, words
from twotower.corpus.document import Document, Draft, Split, split_of

DRAWS: dict[str, Callable[[Random], Draft]] = {
    "arithmetic": arithmetic.draw,
    "code": code.draw,
    "edits": edits.draw,
    "tools": tools.draw,
    "words": words.draw,
    "facts": facts.draw,
}
CATEGORIES: tuple[str, ...] = tuple(DRAWS)
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "arithmetic": 0.27,
    "code": 0.16,
    "edits": 0.14,
    "tools": 0.16,
    "words": 0.17,
    "facts": 0.10,
}


def sample(category: str, split: Split, rng: Random) -> Document:
    """Draw one document of the split: drafts whose key belongs to the other split are redrawn.

    Raises ValueError for an unknown category or split.
    """
    if category not in DRAWS:
        raise ValueError(f"category={category!r} is unknown; use one of {', '.join(CATEGORIES)}")
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
            known = ", ".join(CATEGORIES)
            raise ValueError(f"weights: category {category!r} is unknown; use some of {known}")
        if not weight >= 0:
            raise ValueError(f"weights[{category!r}]={weight} must be 0 or more")
    shares = list(accumulate(chosen.get(category, 0.0) for category in CATEGORIES))
    if shares[-1] <= 0:
        raise ValueError("weights sum to 0; give at least one category a positive weight")
    return _stream(split, Random(f"{split}:{seed}"), shares)


def _stream(split: Split, rng: Random, shares: list[float]) -> Iterator[Document]:
    while True:
        (category,) = rng.choices(CATEGORIES, cum_weights=shares)
        yield sample(category, split, rng)
