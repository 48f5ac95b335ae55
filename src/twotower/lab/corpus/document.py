"""What a document is, and which split its semantic key belongs to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

Split = Literal["train", "test"]
NUM_SPLIT_BUCKETS = 16  # one bucket of keys is the test split
# The names that keys are hashed with: those of the first model's categories, for another name
# would move held-out items into what it was trained on.
HASHED_AS = {
    "math": "arithmetic",
    "editing": "edits",
    "multilingual": "words",
    "knowledge": "facts",
    "lookup": "long_context",
}


@dataclass(frozen=True, kw_only=True)
class Document:
    """A prompt with its reference completion; `answer` is JSON-able: what a checker needs."""

    category: str
    prompt: str
    completion: str
    key: str
    answer: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A document before its split is known; `answer` is computed for kept drafts only."""

    key: str
    prompt: str
    completion: str
    answer: Callable[[], dict[str, object]]


@lru_cache(maxsize=1 << 16)
def split_of(category: str, key: str) -> Split:
    """Return the split that owns this key: a stable hash, the same in every process and version."""
    name = HASHED_AS.get(category, category)
    digest = blake2b(f"{name}:{key}".encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % NUM_SPLIT_BUCKETS == 0 else "train"
