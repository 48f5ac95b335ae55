"""n-grams of the backbone's own answers, with the probability that each is right.

Each order is smoothed by the one below it (Dirichlet prior: MacKay and Peto, 1995), and what comes
of that is corrected by how often it was right on answers that were not counted.
"""

from collections.abc import Sequence

import numpy as np

from twotower.adapt.answers import Answer
from twotower.model.ngrams import ORDER, Ngrams, context_keys

_PRIOR = 3.0  # occurrences that the shorter context counts for
_MIN_SEEN = (1, 1, 1, 2, 2)  # occurrences of a context that is kept, by its tokens
_BINS = 16  # of probabilities that are corrected together
_NO_TOKEN = 2**32 - 1  # before the beginning of a text


def count_ngrams(answers: Sequence[Answer], held: Sequence[Answer]) -> Ngrams:
    """n-grams of answers. held: other answers, by which the probabilities are corrected."""
    keys, nexts = _occurrences(answers)
    below, kept = np.bincount(nexts)[nexts] / max(1, len(nexts)), list[np.ndarray]()
    for order in range(1, ORDER + 1):
        own = keys[order - 1]
        _, context, totals = np.unique(own, return_inverse=True, return_counts=True)
        _, first, pair, counts = np.unique(
            own << 32 | nexts.astype(np.uint64),
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        total = totals[context]
        below = (counts[pair] + _PRIOR * below) / (total + _PRIOR)
        likeliest = first[np.lexsort((below[first], own[first]))]  # each context's is its last
        likeliest = likeliest[np.append(np.diff(own[likeliest]) > 0, True)]
        likeliest = likeliest[total[likeliest] >= _MIN_SEEN[order - 1]]
        kept.append(np.stack([own[likeliest], nexts[likeliest], below[likeliest]]))
    found = _sorted(np.concatenate(kept, axis=1))
    return _corrected(found, held)


def joined(new: Ngrams, old: Ngrams | None) -> Ngrams:
    """Those of two trainings; of a context that both know the new ones."""
    if old is None:
        return new
    is_other = ~np.isin(old.keys, new.keys)
    both = [np.concatenate([n, o[is_other]]) for n, o in zip(new, old, strict=True)]
    return _sorted(np.stack([part.astype(np.float64) for part in both]))


def _sorted(columns: np.ndarray) -> Ngrams:
    """Columns (3, N) by ascending key, one of each."""
    _, first = np.unique(columns[0], return_index=True)
    keys, tokens, probabilities = columns[:, first]
    return Ngrams(keys.astype(np.uint32), tokens.astype(np.int32), probabilities.astype(np.float32))


def _occurrences(answers: Sequence[Answer]) -> tuple[list[np.ndarray], np.ndarray]:
    """Of each token of the answers the keys of the contexts before it, by order, and the token."""
    columns, nexts = [list[int]() for _ in range(ORDER)], list[int]()
    for answer in answers:
        before = [_NO_TOKEN] * ORDER + answer.prompt[-ORDER:]
        text = before + answer.tokens
        nexts += answer.tokens
        for back, column in enumerate(columns, 1):
            column += text[len(before) - back : len(text) - back]
    keys = context_keys(np.array(column, np.uint64) for column in columns)
    return keys, np.array(nexts, np.int64)


def _corrected(ngrams: Ngrams, held: Sequence[Answer]) -> Ngrams:
    """The probabilities as they are on held-out answers: a monotone curve through the bins' shares
    of right tokens, each with the probability itself as one more observation.
    """
    keys, nexts = _occurrences(held)
    claimed, is_right = np.zeros(len(nexts)), np.zeros(len(nexts), bool)
    for own in keys:  # longer contexts last
        places = ngrams.keys.searchsorted(own.astype(np.uint32)).clip(max=len(ngrams.keys) - 1)
        is_known = ngrams.keys[places] == own
        claimed[is_known] = ngrams.probabilities[places[is_known]]
        is_right[is_known] = (ngrams.tokens[places] == nexts)[is_known]
    centres = (np.arange(_BINS) + 0.5) / _BINS
    bins = np.minimum((claimed * _BINS).astype(int), _BINS - 1)[claimed > 0]
    rights = np.cumsum([0, *(np.bincount(bins, is_right[claimed > 0], _BINS) + centres)])
    counts = np.cumsum([0, *(np.bincount(bins, minlength=_BINS) + 1)])
    curve = [_isotonic(place, rights, counts) for place in range(_BINS)]
    return ngrams._replace(
        probabilities=np.interp(ngrams.probabilities, centres, curve).astype(np.float32)
    )


def _isotonic(place: int, sums: np.ndarray, counts: np.ndarray) -> float:
    """Isotonic regression of shares at one place: sums and counts (n + 1,) are cumulative."""
    means = (sums[place + 1 :] - sums[: place + 1, None]) / (
        counts[place + 1 :] - counts[: place + 1, None]
    )
    return float(means.min(1).max())  # of all that begins before it, the least that ends behind it
