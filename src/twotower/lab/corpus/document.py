"""What a document is, which split its semantic key belongs to, and the words it is made of
(tables.toml).
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b
from importlib import resources
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
    "answered": "tools",
    "math_with_tools": "arithmetic",
    "refusal_with_tools": "refusal",
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


@cache
def _tables() -> dict[str, dict[str, str]]:
    file = resources.files("twotower.lab.corpus") / "tables.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def word_list(text: str) -> tuple[str, ...]:
    """Split at white space: lists of words stay readable without a quote around each."""
    return tuple(text.split())


def words(section: str, name: str) -> tuple[str, ...]:
    """A list of words of the tables."""
    return word_list(_tables()[section][name])


def lines(section: str, name: str) -> list[str]:
    """The lines of a text of the tables."""
    return _tables()[section][name].strip("\n").split("\n")


def entries(section: str, name: str) -> list[tuple[list[str], list[str]]]:
    """Entries of the tables: the fields of the first line, and the indented lines below it."""
    found = []
    for entry in re.split(r"\n(?=\S)", _tables()[section][name].strip("\n")):
        head, *body = entry.split("\n")
        found.append((head.split(" | "), body))
    return found


MEN = words("words", "men")
NAMES = MEN + words("words", "women")
THINGS = words("words", "things")
CITIES = words("words", "cities")
