"""n-grams of earlier texts: what is remembered, what makes room, how much memory it takes."""

import numpy as np
import pytest

from twotower.engine.drafts_lookup import Lookup
from twotower.engine.lookup_cache import SLOT_BYTES, LookupCache
from twotower.model.ngrams import Ngrams, context_keys

PLENTY = 1 << 20


def found(cache: LookupCache, *newest: int) -> int | None:
    """The token that is found."""
    ngram = cache.find(newest)
    return None if ngram is None else ngram[0]


def test_the_longest_context_answers() -> None:
    """Guards short contexts that would answer for long ones, and the beginning of an answer, whose
    context is the prompt's end.
    """
    cache = LookupCache(PLENTY)
    assert cache.find([1, 2]) is None
    cache.learn([1, 2], [3, 4, 5])
    cache.learn([9], [8, 4, 6])
    assert [found(cache, *text) for text in ([1, 2], [3, 4], [8, 4], [0, 2], [1])] == [
        3, 5, 6, 3, None,
    ]  # fmt: skip
    long, short = cache.find([2, 3, 4]), cache.find([0, 0, 3])
    assert long is not None and short is not None and long[1] > short[1]


def test_what_follows_most_often_wins() -> None:
    """Guards a context that would keep what followed it first, or take over all that ever did."""
    cache = LookupCache(PLENTY)
    for token, expected in ((5, 5), (5, 5), (6, 5), (6, 6), (6, 6), (5, 6), (5, 5)):
        cache.learn([1], [token])
        assert found(cache, 1) == expected


def test_memory_is_bounded_and_rare_contexts_make_room() -> None:
    """Guards the memory of a server: a table that grew with every text, or was full for ever."""
    cache = LookupCache(100 * SLOT_BYTES)
    for _ in range(3):
        cache.learn([1], [2])
    for start in range(10, 60):
        cache.learn([start], [start + 100])
    assert found(cache, 1) == 2
    assert cache._slots is not None and sum(map(len, cache._slots)) == 300
    assert sum(part.nbytes for part in cache._slots) == 100 * SLOT_BYTES
    newest = [found(cache, start) for start in range(50, 60)]
    assert sum(token is not None for token in newest) >= 8
    LookupCache(1).learn([1], [2, 3])  # too small for any use, and no error


def test_a_text_that_was_never_seen_finds_nothing() -> None:
    """Guards drafts behind contexts that only share a slot with a known one."""
    cache = LookupCache(50 * SLOT_BYTES)
    cache.learn([1], [2, 3])
    assert all(found(cache, token) is None for token in range(10, 2000))
    assert cache.find([]) is None


def test_static_and_learnt_ngrams_meet_in_one_guess() -> None:
    """Guards the choice between them: the likelier token wins, and a row that sees one of them fail
    believes that one less.
    """
    cache = LookupCache(PLENTY)
    cache.learn([4], [5])
    for probability, expected in ((0.9, 8), (0.02, 5)):
        static = Ngrams(
            np.array(context_keys([4]), np.uint32),
            np.array([8], np.int32),
            np.array([probability], np.float32),
        )
        lookup = Lookup([static, cache])
        lookup.extend([4])
        assert next(lookup.guesses([], 1)).token == expected
    first = next(lookup.guesses([], 1)).sure
    lookup.extend([9, 4])
    assert next(lookup.guesses([], 1)).sure < first


def test_a_cache_without_room_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Guards rows of others, and of every request after them, that a cache too large for memory
    would end.
    """
    cache = LookupCache(2**62)
    cache.learn([1], [2])
    cache.learn([1], [2])
    assert not cache and cache.find([1]) is None
    assert caplog.text.count("memory has no room for the lookup cache") == 1
