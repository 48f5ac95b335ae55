"""What probably follows: what did so earlier in the text, what the model mostly wrote behind the
newest tokens elsewhere, and what the denoiser has drafted. Each token is the likeliest of these.

The first two cost no pass; they are known as prompt lookup and as a static lookup cache.
Source: https://github.com/apoorvumang/prompt-lookup-decoding; arXiv 2311.08252.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from twotower.engine.batch import Batch
from twotower.engine.drafts import Proposal, best_length
from twotower.engine.request import Row
from twotower.model.ngrams import ORDER, Ngrams

MIN_MATCH, MAX_MATCH = 2, 16  # tokens that must have occurred before, and that are compared
MAX_TRIED = 32  # occurrences of the last two tokens that are compared, the newest first
MAX_DRAFT = 15  # tokens, where the denoiser wrote no more: with the newest one 16 places
# How often the next token is right behind a match of so many tokens (SmolLM2's answers). After as
# many tokens as _USUAL_WEIGHT a row's own rate counts as much.
_USUAL = {2: 0.57, 3: 0.67, 4: 0.74, 8: 0.83, 16: 0.95}
_USUAL_WEIGHT = 10
_MAX_SURE, _MIN_SURE = 0.98, 0.05  # of a token, and of a whole draft that may go on
_BINS = 8  # of probabilities that a row corrects together


class LookupIndex:
    """Where each pair of tokens of one text has occurred; grows with the text."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._newest: dict[tuple[int, int], int] = {}  # pair: where the token after it stands
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

    @property
    def num_tokens(self) -> int:
        """Tokens of the text so far."""
        return len(self._text)

    def end(self, count: int, after: Sequence[int] = ()) -> list[int]:
        """The last `count` tokens of the text and what comes after it."""
        return [*self._text[-count:], *after][-count:]

    def find(self, after: Sequence[int], most: int) -> tuple[int, list[int]]:
        """How many tokens at the end of the text and `after` occurred before, and up to `most` that
        followed there. The longest match, the newest of equals; (0, []) below MIN_MATCH.

        What followed may run into the end of the text: then it repeats, as the text would.
        """
        end = self.end(MAX_MATCH, after)
        length, place = 0, -1
        at = self._newest.get((end[-2], end[-1]), -1) if len(end) >= MIN_MATCH else -1
        for _ in range(MAX_TRIED):
            if at < 0 or length == len(end):
                break
            if (found := self._num_equal(end, at)) > length:
                length, place = found, at
            at = self._earlier[at]
        if length == 0:
            return 0, []
        text = self._text[place : place + most]
        if len(text) < most:  # all that there is
            text += after
        return length, [text[i % len(text)] for i in range(most)]

    def _num_equal(self, end: Sequence[int], at: int) -> int:
        """How many tokens before place `at` are those at the end."""
        count = 0
        while count < min(len(end), at) and self._text[at - 1 - count] == end[-1 - count]:
            count += 1
        return count


class Lookup:
    """Guesses how one text goes on, and learns how often guesses of each kind are right in it."""

    def __init__(self, ngrams: Ngrams | None, copies: bool = True) -> None:
        self.index = LookupIndex()
        self._ngrams, self._copies = ngrams, copies  # copies: of what the text said before
        self._tried, self._right = Counter[object](), Counter[object]()
        self._guessed: list[tuple[int, object]] = []  # tokens of the newest guess, and their kinds

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens: the newest guess is judged by them."""
        for token, (guess, kind) in zip(tokens, self._guessed, strict=False):
            self._tried[kind] += 1
            if guess != token:
                break
            self._right[kind] += 1
        self._guessed = []
        self.index.extend(tokens)

    def guess(
        self, known: Sequence[int], most: int, drafted: Sequence[tuple[int, float]] = ()
    ) -> tuple[list[int], list[float]]:
        """Up to `most` tokens behind the text and the known ones, and how probable each is, given
        that those before it are right. drafted: by the denoiser, with its own confidence.
        """
        newest, sure = self.index.end(ORDER, known), 1.0
        found, rates, kinds = list[int](), list[float](), list[object]()
        length, copied = 0, list[int]()
        while len(found) < most and sure >= _MIN_SURE:
            if self._copies and not copied:  # nothing yet, or another token was likelier
                length, copied = self.index.find([*known, *found], most - len(found))
            ways = list[tuple[float, int, object]]()
            if copied:
                kind = max(n for n in _USUAL if n <= length)
                ways.append((self._rate(kind, _USUAL[kind]), copied[0], kind))
            if self._ngrams is not None and (ngram := self._ngrams.find(newest)) is not None:
                ways.append(self._binned("n-gram", *ngram))
            if drafted:
                ways.append(self._binned("denoiser", *drafted[0]))
            if not ways:
                break
            rate, token, kind_of_way = max(ways, key=lambda way: way[0])
            length = min(length + 1, MAX_MATCH)
            copied = copied[1:] if copied and copied[0] == token else []
            drafted = drafted[1:] if drafted and drafted[0][0] == token else ()
            found.append(token)
            rates.append(rate)
            kinds.append(kind_of_way)
            newest, sure = [*newest[1 - ORDER :], token], sure * rate
        self._guessed = [*((token, None) for token in known), *zip(found, kinds, strict=True)]
        return found, rates

    def _binned(self, source: str, token: int, usual: float) -> tuple[float, int, object]:
        kind = source, int(usual * _BINS)
        return self._rate(kind, usual), token, kind

    def _rate(self, kind: object, usual: float) -> float:
        """How often guesses of a kind are right here, of which so many are right elsewhere."""
        right = self._right[kind] + _USUAL_WEIGHT * usual
        return min(_MAX_SURE, right / (self._tried[kind] + _USUAL_WEIGHT))


def propose(row: Row, batch: Batch, known: Sequence[int]) -> Proposal | None:
    """The draft behind a row's tokens and the known ones that costs no pass, if any pays."""
    if row.options.drafts == "denoiser":
        return None
    tokens, gain = continuation(row, batch, known)
    return Proposal("lookup", gain, tokens) if tokens else None


def continuation(
    row: Row,
    batch: Batch,
    known: Sequence[int],
    drafted: Sequence[tuple[int, float]] = (),
    writing: float = 0.0,
) -> tuple[list[int], float]:
    """What probably follows a row's tokens and the known ones, as much of it as is worth a place in
    a pass, and the gain that is expected. drafted: by the denoiser, whose passes took `writing` AR
    steps.
    """
    if row.lookup is None:
        copies = row.options.drafts != "denoiser"
        row.lookup = Lookup(batch.model.ngrams if copies else None, copies)
    done, length = row.lookup.index.num_tokens, len(row.prompt) + len(row.tokens)
    row.lookup.extend(row.between(done, length))
    begin = 1 + len(known)
    most = min(max(1 + MAX_DRAFT, begin + len(drafted)), row.num_left) - begin
    tokens, rates = row.lookup.guess(known, most, drafted)
    expected = list(accumulate([float(begin), *accumulate(rates, mul)]))
    costs = [batch.pass_cost(begin + count) for count in range(len(expected))]
    count, gain = best_length(expected, costs, writing)
    return tokens[:count], gain
