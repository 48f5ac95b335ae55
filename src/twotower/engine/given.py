"""Rows whose text is given: the context tower reads it and says how probable each token is."""

from twotower.engine import blocks
from twotower.engine.batch import Batch, DecodingMode, Draft

_TOKENS = 32  # that are read at a time: each has logits of the size of the vocabulary


def draft(batch: Batch) -> None:
    """The next given tokens of each row, as a block of which nothing is rejected."""
    batch.drafts = [Draft([*row.given[len(row.tokens) :][:_TOKENS]]) for row in batch.rows]


GIVEN = DecodingMode(choose=blocks.choose, draft=draft)
