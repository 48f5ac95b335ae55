"""What probably follows: what did so earlier in the text, what the model mostly wrote behind the
newest tokens elsewhere, and what the denoiser has drafted. Each token is the likeliest of these.

The first two cost no pass; they are known as prompt lookup and as lookup caches, static or dynamic.
Source: https://github.com/apoorvumang/prompt-lookup-decoding; arXiv 2311.08252.
"""

from collections.abc import Collection, Iterator, Sequence
from heapq import heappop, heappush
from itertools import count
from operator import itemgetter
from typing import NamedTuple

from twotower.engine.lookup_cache import LookupCache
from twotower.model.ngrams import ORDER, Ngrams

MIN_MATCH, MAX_MATCH = 2, 16  # tokens that must have occurred before, and that are compared
MAX_TRIED = 32  # occurrences of the last two tokens that are compared, the newest first
# How often the next token is right behind a match of so many tokens (SmolLM2's answers). After as
# many tokens as _USUAL_WEIGHT a row's own rate counts as much.
_USUAL = {2: 0.57, 3: 0.67, 4: 0.74, 8: 0.83, 16: 0.95}
_KIND = [max((n for n in _USUAL if n <= length), default=0) for length in range(MAX_MATCH + 1)]
_USUAL_WEIGHT = 10
_MAX_SURE, _MIN_SURE = 0.98, 0.05  # of a token, and of a whole draft that may go on
_BINS = 8  # of probabilities that a row corrects together
# How often a token that is not the likeliest is right, by its own rate, and by what those before it
# leave.
_OTHER_RATE, _OTHER_REST = 0.6, 0.8

Candidates = Sequence[tuple[int, float]]  # tokens for one position and how probable each is


class Guess(NamedTuple):
    """A token that may follow a text."""

    token: int
    parent: int  # the index of what it follows among the known tokens and the guesses, or -1
    sure: float  # how probable it is that it is reached and right


class _Way(NamedTuple):
    """One way in which a text may go on."""

    behind: list[int]  # the known tokens and those of this way
    parent: int  # the index of what the last of them follows
    sure: float  # how probable all of them are
    kind: object  # of guess that the last one is; None where nothing is learnt from it
    length: int  # of the match that `copied` goes on with
    copied: Sequence[int]  # what followed there
    drafted: Sequence[Candidates]  # what the denoiser wrote behind them


class LookupIndex:
    """Where each pair of tokens of one text has occurred; grows with the text."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._newest: dict[tuple[int, ...], int] = {}  # pair: where the token after it stands
        self._earlier: list[int] = []  # of each token, where the one after the same pair stood; -1

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        text = self._text
        for token in tokens:
            at = len(text)
            pair = (text[at - 2], text[at - 1]) if at >= 2 else None
            self._earlier.append(-1 if pair is None else self._newest.get(pair, -1))
            if pair is not None:
                self._newest[pair] = at
            text.append(token)

    def end(self, count: int, after: Sequence[int] = ()) -> list[int]:
        """The last `count` tokens of the text and what comes after it."""
        own = count - len(after)
        return [*self._text[-own:], *after] if own > 0 else [*after[-count:]]

    def find(self, after: Sequence[int], most: int) -> tuple[int, list[int]]:
        """How many tokens at the end of the text and `after` occurred before, and up to `most` that
        followed there. The longest match, the newest of equals; (0, []) below MIN_MATCH.

        What followed may run into the end of the text: then it repeats, as the text would.
        """
        at = self._newest.get(tuple(self.end(MIN_MATCH, after)), -1)
        if at < 0:
            return 0, []
        end = self.end(MAX_MATCH, after)
        length, start = 0, -1
        for _ in range(MAX_TRIED):
            if at < 0 or length == len(end):
                break
            if (found := self._num_equal(end, at)) > length:
                length, start = found, at
            at = self._earlier[at]
        text = self._text[start : start + most]
        if len(text) < most:  # all that there is
            text += after
        return length, [text[i % len(text)] for i in range(most)]

    def _num_equal(self, end: Sequence[int], at: int) -> int:
        """How many tokens before index `at` are those at the end."""
        text, most = self._text, min(len(end), at)
        return next((n for n in range(most) if text[at - 1 - n] != end[-1 - n]), most)


class Lookup:
    """Guesses how one text goes on, and learns how often guesses of each kind are right in it."""

    def __init__(self, ngrams: Sequence[Ngrams | LookupCache] = (), copies: bool = True) -> None:
        self.index = LookupIndex()
        self.num_tokens = 0  # of the text so far
        self._ngrams, self._copies = ngrams, copies  # copies: of what the text said before
        self._judged: dict[object, tuple[int, int]] = {}  # of each kind, guesses tried and right
        # The newest guess: the index of what each token follows, the token, and its kind.
        self._guessed: list[tuple[int, int, object]] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens: the newest guess is judged by them."""
        at, left = -1, iter(tokens)
        token = next(left, None)
        for index, (parent, guess, kind) in enumerate(self._guessed):
            if parent != at or token is None:
                continue
            tried, right = self._judged.get(kind, (0, 0))
            self._judged[kind] = tried + 1, right + (guess == token)
            if guess == token:
                at, token = index, next(left, None)
        self._guessed = []
        self.num_tokens += len(tokens)
        if self._copies or self._ngrams:  # else nothing is looked up
            self.index.extend(tokens)

    def guesses(
        self,
        known: Sequence[int],
        most: int,
        drafted: Sequence[Candidates] = (),
        most_ways: int = 1,
        ends: Collection[int] = (),
    ) -> Iterator[Guess]:
        """Up to `most` tokens behind the text and the known ones, the likeliest first and none
        before what it follows; each is looked up when it is asked for. drafted: by the denoiser,
        with its own confidence. most_ways: in which each token may go on; ends: tokens that end a
        text.
        """
        begin, number = len(known), count()
        guessed = self._guessed = [(index - 1, token, None) for index, token in enumerate(known)]
        way, index = _Way([*known], begin - 2, 1.0, None, 0, (), drafted), begin - 1
        ways: list[tuple[float, int, _Way]] = []  # the likeliest on top, the first of equals
        while True:
            if way.sure >= _MIN_SURE:
                left = most - len(way.behind) + begin
                for following in self._go_on(way, index, left, most_ways):
                    if following.behind[-1] not in ends:
                        heappush(ways, (-following.sure, next(number), following))
            if not ways or len(guessed) - begin >= most:
                return
            way, index = heappop(ways)[2], len(guessed)
            guessed.append((way.parent, way.behind[-1], way.kind))
            yield Guess(way.behind[-1], way.parent, way.sure)

    def _go_on(self, way: _Way, index: int, most: int, most_ways: int) -> list[_Way]:
        """How a way, whose last token is at `index`, goes on, the likeliest first."""
        behind, _, sure, _, length, copied, drafted = way
        if self._copies and not copied:  # nothing yet, or another token was likelier
            length, copied = self.index.find(behind, most)
        guesses: list[tuple[float, int, object]] = []
        if copied:
            match = _KIND[length]
            guesses.append((self._rate(match, _USUAL[match]), copied[0], match))
        if self._ngrams:
            newest = self.index.end(ORDER, behind)
            for table in self._ngrams:
                if (ngram := table.find(newest)) is not None:
                    guesses.append(self._binned(type(table), *ngram))
        if drafted:
            guesses += [self._binned("denoiser", *own) for own in drafted[0][:most_ways]]
        if len(guesses) > 1:
            guesses.sort(key=itemgetter(0), reverse=True)
        ways: list[_Way] = []
        rest, length = 1.0, min(length + 1, MAX_MATCH)
        for rate, token, kind in guesses:
            if ways:
                if len(ways) == most_ways:
                    break
                if any(token == way.behind[-1] for way in ways):
                    continue
                rate, kind = min(_OTHER_RATE * rate, _OTHER_REST * rest), None
            rest -= rate
            copy = copied[1:] if copied and copied[0] == token else ()
            left = drafted[1:] if drafted and drafted[0][0][0] == token else ()
            ways.append(_Way([*behind, token], index, sure * rate, kind, length, copy, left))
        return ways

    def _binned(self, source: object, token: int, usual: float) -> tuple[float, int, object]:
        kind = source, int(usual * _BINS)
        return self._rate(kind, usual), token, kind

    def _rate(self, kind: object, usual: float) -> float:
        """How often guesses of a kind are right here, of which so many are right elsewhere."""
        tried, right = self._judged.get(kind, (0, 0))
        return min(_MAX_SURE, (right + _USUAL_WEIGHT * usual) / (tried + _USUAL_WEIGHT))
