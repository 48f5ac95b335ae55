"""Where drafts of mode="speculative" come from, and when a row has one.

drafts_lookup proposes what the text has said before, drafts_denoiser lets the denoiser tower write
where that pays, which each row's controller knows of what they have yielded in the row.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from twotower.diffusion import Sampler
from twotower.model.backend import PassCosts

Drafts = Literal["auto", "lookup", "denoiser"]
DrafterName = Literal["lookup", "denoiser"]

_BESIDE_S = 0.0004  # seconds of an AR step of one row beside its pass
_FADES = 0.997  # what is left of a row's history after a cycle without such a draft


class Proposal(NamedTuple):
    """A draft that a row may have in this cycle."""

    drafter: DrafterName
    tokens: Sequence[int] = ()  # what follows the known ones
    parents: Sequence[int] = ()  # what each follows, by index: 0 is the newest token
    length: int = 1  # tokens to verify, with the known ones
    expected: float = 1.0  # tokens of the cycle
    sure: float = 0.0  # how probable it is that the likeliest next token is right


class DraftController:
    """What the denoiser's drafts are worth in a row, by the row's own history alone.

    A draft adds tokens to those of a lookup, the fewer the surer that is of its first one, and a
    cycle with it yields at least as many as such cycles mostly do. What was learnt fades, and
    drafts are tried again. more: tokens that drafts are expected to add where no lookup is right;
    trust: so many drafts of the row count as much as that. must_try: nothing is known, and the
    first draft is a trial.
    """

    def __init__(self, more: float, trust: float, must_try: bool = False) -> None:
        self._more, self._trust, self.must_try = more, trust, must_try
        self._added = self._unsure = self._tokens = self._drafts = 0.0
        self._instead: Sequence[int] = ()  # of the cycle that has a draft
        self._sure = 0.0

    def expected(self, instead: Proposal) -> float:
        """Tokens of a cycle with a draft, where this would be verified instead."""
        more, trust = self._more, self._trust
        added = (trust * more + self._added) / (trust + self._unsure)
        usual = (trust * (1 + more) + self._tokens) / (trust + self._drafts)
        return max(instead.expected + added * (1 - instead.sure), usual)

    def begin(self, instead: Sequence[int], sure: float) -> None:
        """A draft is written. instead: what else would be verified; sure: of the first of that."""
        self._instead, self._sure, self.must_try = instead, sure, False

    def record_draft(self, tokens: Sequence[int]) -> None:
        """The cycle is over, and these are its tokens."""
        pairs = enumerate(zip(self._instead, tokens, strict=False), 1)
        wrong = (number for number, (one, other) in pairs if one != other)
        num_instead = next(wrong, len(self._instead) + 1)
        self._added += len(tokens) - min(num_instead, len(tokens))
        self._unsure += 1 - self._sure
        self._tokens += len(tokens)
        self._drafts += 1

    def record_other(self) -> None:
        """A cycle went by without such a draft."""
        self._added *= _FADES
        self._unsure *= _FADES
        self._tokens *= _FADES
        self._drafts *= _FADES


class BatchCosts:
    """AR steps of one row that passes over tokens of several rows take; what is around a longer
    pass is the same. has_idle_lanes: as on an accelerator, whose arithmetic waits for weights where
    rows are few; only the longest row counts.
    """

    def __init__(self, costs: PassCosts, has_idle_lanes: bool = False) -> None:
        self.passes, self._has_idle_lanes = costs, has_idle_lanes
        self.beside = 0.0 if costs.step_s is None else _BESIDE_S / (costs.step_s + _BESIDE_S)
        """The share of an AR step of one row that is no pass; 0 where that was not measured."""
        self.is_padded = costs.is_padded or has_idle_lanes
        """Whether all rows are as long as the longest one."""
        self._row = costs.row * (1 - self.beside)
        self._last = max(costs.tokens)
        self._known: dict[int, float] = {}
        self._least: dict[int, float] = {}

    def of_pass(self, lengths: Sequence[int]) -> float:
        """Over so many tokens of each row."""
        rows = 1 if self._has_idle_lanes else len(lengths)
        tokens = rows * max(lengths) if self.is_padded else sum(lengths)
        return self._of_tokens(tokens) + self._row * (rows - 1)

    def least_more(self, lengths: Sequence[int]) -> float:
        """What each token that lengthens rows costs at the least, however many do; 0 where one
        that lengthens the longest one lets others grow at no cost.
        """
        if self.is_padded:
            return 0.0
        begin = sum(lengths)
        if begin not in self._least:
            # Costs grow at the same pace again behind every whole pass of the longest kind.
            ends = range(begin + 1, begin + self._last + 1)
            own = self._of_tokens(begin)
            self._least[begin] = min((self._of_tokens(e) - own) / (e - begin) for e in ends)
        return self._least[begin]

    def _of_tokens(self, count: int) -> float:
        if count not in self._known:
            whole, rest = divmod(count, self._last)
            tokens = self.passes.tokens
            last = next((cost for most, cost in tokens.items() if 0 < rest <= most), 0.0)
            passes = whole * tokens[self._last] + last
            self._known[count] = self.beside + (1 - self.beside) * passes
        return self._known[count]


class Drafting(NamedTuple):
    """What decides about the drafts of a batch."""

    costs: BatchCosts
    sampler: Sampler  # without chance: the context tower has the last word
    may_branch: bool
