"""n-grams of a model's own texts: what it most often wrote behind the newest few tokens.

A draft out of them needs look-ups and no pass. Known as a static lookup cache (llama.cpp) or a
datastore (arXiv 2311.08252). Contexts are kept as hashes of 32 bits: one that never occurred is
taken for a known one once in thousands of times, and costs a rejected token.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

ORDER = 5  # tokens of the longest context
NGRAM_BYTES = 12  # of memory, each
_BITS, _FACTOR = 0xFFFFFFFF, 0x9E3779B1

T = TypeVar("T", int, np.ndarray)


def context_keys(newest_first: Iterable[T]) -> list[T]:
    """The keys of the contexts of 1, 2, ... tokens, from the newest token backwards: of one text
    (ints), or of many at once (arrays of uint64).
    """
    keys: list[T] = []
    key: T | int = 0
    for token in newest_first:
        mixed = ((key ^ token) + 1) * _FACTOR & _BITS
        key = mixed ^ (mixed >> 15)
        keys.append(key)
    return keys


class Ngrams(NamedTuple):
    """keys (N,) uint32, ascending; tokens (N,) int32: the likeliest behind each context;
    probabilities (N,) float32: how often it is the model's choice there.
    """

    keys: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray

    def find(self, newest: Sequence[int]) -> tuple[int, float] | None:
        """The likeliest token behind the newest ones, by the longest context that is known, and its
        probability.
        """
        keys, known = context_keys(newest[: -ORDER - 1 : -1]), self.keys.data
        indices = self.keys.searchsorted(np.array(keys, np.uint32)).tolist()
        for key, index in zip(reversed(keys), reversed(indices), strict=True):
            if index < len(known) and known[index] == key:
                return int(self.tokens[index]), float(self.probabilities[index])
        return None
