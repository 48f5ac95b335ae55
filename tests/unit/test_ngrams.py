"""n-grams of a model's answers: what is counted, how probable it is said to be, what is found."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.adapt.answers import Answer
from twotower.adapt.ngrams import count_ngrams, joined
from twotower.model.ngrams import ORDER, Ngrams, context_keys


def answers_of(*texts: Sequence[int], prompt: Sequence[int] = (1, 2)) -> list[Answer]:
    return [Answer(number=i, task="t", prompt=[*prompt], tokens=[*t]) for i, t in enumerate(texts)]


@given(st.lists(st.lists(st.integers(0, 200_000), min_size=3, max_size=3), min_size=1))
def test_many_keys_are_those_of_one(contexts: list[list[int]]) -> None:
    """Guards n-grams that are counted under one key and looked up under another."""
    columns = np.array(contexts, np.uint64).T
    many = np.stack(context_keys(columns))
    assert many.T.tolist() == [context_keys(context) for context in contexts]
    assert many.max() < 2**32


def test_keys_of_contexts_differ() -> None:
    """Guards a hash that throws contexts together: of 100,000 pairs a few may meet by chance."""
    pairs = np.stack(np.meshgrid(np.arange(400, dtype=np.uint64), np.arange(250, dtype=np.uint64)))
    one, two = context_keys(pairs.reshape(2, -1))
    assert len(np.unique(two)) > 99_990 and len(np.unique(one)) == 400


def test_the_longest_context_is_believed() -> None:
    """Guards short contexts that would answer for long ones."""
    found = count_ngrams(answers_of([3, 4, 5, 9], [3, 4, 5, 9], [6, 4, 5, 7], [6, 4, 5, 7]), [])
    assert [found.find(text)[0] for text in ([3, 4, 5], [6, 4, 5], [0, 0, 3])] == [9, 7, 4]  # type: ignore[index]
    assert found.find([99]) is None and found.find([]) is None
    first = found.find([1, 2])
    assert first is not None and first[0] in (3, 6)  # prompts are contexts
    assert (np.diff(found.keys.astype(np.int64)) > 0).all()


def test_rare_long_contexts_are_left_out() -> None:
    """Guards the size of the file: of what occurred once three tokens are context enough."""
    once = count_ngrams(answers_of(range(10, 30)), [])
    twice = count_ngrams(answers_of(range(10, 30), range(10, 30)), [])
    assert len(once.keys) < 3 * 20 + 1 < len(twice.keys) <= ORDER * 20


def test_tokens_are_counted_by_every_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the end of a training: NumPy 2.1 counts no unsigned numbers."""
    counted = np.bincount

    def older(numbers: np.ndarray, *rest: object, **named: object) -> np.ndarray:
        found: np.ndarray = counted(numbers.astype(np.int64, casting="safe"), *rest, **named)  # type: ignore[call-overload]
        return found

    monkeypatch.setattr(np, "bincount", older)
    trained = answers_of([3, 4], [3, 4])
    assert count_ngrams(trained, trained).find([3])[0] == 4  # type: ignore[index]


def test_seen_more_often_is_surer() -> None:
    found = count_ngrams(answers_of(*[[3, 4]] * 20, [5, 6]), [])
    often, once = found.find([3]), found.find([5])
    assert often is not None and once is not None and 0.5 < often[1] < 1 and once[1] < often[1]


def test_probabilities_are_those_of_held_out_answers() -> None:
    """Guards drafts that are trusted because they were seen in training."""
    trained = answers_of(*([3, 4, 5, 6] for _ in range(50)))
    right, wrong = answers_of(*[[3, 4, 5, 6]] * 100), answers_of(*[[3, 9, 5, 8]] * 100)
    sure, unsure = count_ngrams(trained, right).find([3]), count_ngrams(trained, wrong).find([3])
    assert sure is not None and unsure is not None
    assert sure[1] > 0.9 and unsure[1] < 0.4


def test_newer_ngrams_win() -> None:
    """Guards what an earlier training knew, and what a later one knows better."""
    old, new = count_ngrams(answers_of([3, 4], [5, 6]), []), count_ngrams(answers_of([3, 7]), [])
    both = joined(new, old)
    assert [both.find([token])[0] for token in (3, 5)] == [7, 6]  # type: ignore[index]
    assert joined(new, None) is new
    assert [part.dtype for part in both] == [np.uint32, np.int32, np.float32]
    assert len(both.keys) == len({*old.keys.tolist(), *new.keys.tolist()})


@pytest.mark.parametrize("end", [0, 1, -1])
def test_unknown_keys_are_found_nowhere(end: int) -> None:
    """Guards the ends of the table: a key beyond the last is no key."""
    keys = np.array([context_keys([1])[0] + end], np.uint32)
    ngrams = Ngrams(keys, np.array([5], np.int32), np.array([0.5], np.float32))
    assert (ngrams.find([1]) is not None) == (end == 0)
