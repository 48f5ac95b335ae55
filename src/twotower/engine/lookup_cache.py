"""n-grams of texts that have ended, from which lookup drafts in later ones.

Known as a dynamic lookup cache (llama.cpp) or a datastore (arXiv 2311.08252). Contexts of 1 to
ORDER tokens are kept as hashes of 32 bits, as in `model.ngrams`, each in the one slot that its hash
names.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from twotower.model.ngrams import ORDER, context_keys

SLOT_BYTES = 9
_MAX_LEAD = 15
_log = logging.getLogger(__name__)
# How probable it is that what followed a context of 1, 2, ... tokens once, or more often, follows
# again, where no longer one is known (SmolLM2's answers). Low for once: static n-grams know better.
_USUAL = (0.05, 0.1, 0.15, 0.2, 0.3), (0.15, 0.3, 0.45, 0.5, 0.7)


class _Slots(NamedTuple):
    """keys, tokens, leads (N,): a context, what followed it, and how much oftener than others."""

    keys: memoryview
    tokens: memoryview
    leads: memoryview


class LookupCache:
    """What followed contexts in earlier texts, within `max_bytes`; no memory before the first.

    Each occurrence of another token, or of another context in its slot, weakens what a slot holds
    until the newcomer takes its place: what is often right stays longest. For one writer, while
    nobody reads.
    """

    def __init__(self, max_bytes: int) -> None:
        self._num_slots = max(1, max_bytes // SLOT_BYTES)
        self._slots: _Slots | None = None

    def __bool__(self) -> bool:
        """Whether any text is known."""
        return self._slots is not None

    def find(self, newest: Sequence[int]) -> tuple[int, float] | None:
        """What followed the newest tokens, by the longest context that is known, and how probable
        it is.
        """
        if self._slots is None:
            return None
        known, tokens, leads = self._slots
        keys = context_keys(newest[: -ORDER - 1 : -1])
        for order in range(len(keys) - 1, -1, -1):
            slot = keys[order] % self._num_slots
            if known[slot] == keys[order]:
                return tokens[slot], _USUAL[leads[slot] > 1][order]
        return None

    def learn(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Remember a text that followed a prompt."""
        if self._num_slots == 0:
            return
        if self._slots is None:
            types = np.uint32, np.int32, np.uint8
            try:
                self._slots = _Slots(*(np.zeros(self._num_slots, kind).data for kind in types))
            except MemoryError:
                num_bytes, self._num_slots = self._num_slots * SLOT_BYTES, 0
                _log.warning(
                    "lookup_cache_bytes=%d: memory has no room for the lookup cache, and lookups "
                    "go on without it; use less, or 0",
                    num_bytes,
                )
                return
        known, followed, leads = self._slots
        text = [*prompt[-ORDER:], *tokens]
        for end in range(len(text) - len(tokens), len(text)):
            token = text[end]
            for key in context_keys(text[max(0, end - ORDER) : end][::-1]):
                slot = key % self._num_slots
                lead = leads[slot]
                if known[slot] == key and followed[slot] == token:
                    leads[slot] = min(lead + 1, _MAX_LEAD)
                elif lead > 1:
                    leads[slot] = lead - 1
                else:
                    known[slot], followed[slot], leads[slot] = key, token, 1
