"""Where drafts of mode="speculative" come from, and when a row has one.

drafts_lookup proposes what the text has said before, drafts_denoiser lets the denoiser tower write
where that pays, which each row's controller knows of what they have yielded in the row.
"""

import math
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
    gain: float  # expected: tokens of the cycle by AR steps that they cost
    tokens: Sequence[int] = ()  # what follows the known ones
    parents: Sequence[int] = ()  # what each follows, by index: 0 is the newest token
    expected: float = 1.0  # tokens of the cycle
    sure: float = 0.0  # how probable it is that the likeliest next token is right


class DraftController:
    """What the denoiser's drafts are worth in a row, by the row's own history alone.

    A draft adds tokens to those of a lookup, the fewer the surer that is of its first one, and a
    cycle with it yields at least as many as such cycles mostly do. What was learnt fades, and
    drafts are tried again. more: tokens that drafts are expected to add where no lookup is right;
    trust: so many drafts of the row count as much as that. is_guess: nothing is known, and the
    first draft comes before all others.
    """

    def __init__(self, more: float, trust: float, is_guess: bool = False) -> None:
        self._more, self._trust, self._must_try = more, trust, is_guess
        self._added = self._unsure = self._tokens = self._drafts = 0.0
        self._instead: Sequence[int] = ()  # of the cycle that has a draft
        self._sure = 0.0

    def expected(self, instead: Proposal) -> float:
        """Tokens of a cycle with a draft, where this would be verified instead."""
        if self._must_try:
            return math.inf
        more, trust = self._more, self._trust
        added = (trust * more + self._added) / (trust + self._unsure)
        usual = (trust * (1 + more) + self._tokens) / (trust + self._drafts)
        return max(instead.expected + added * (1 - instead.sure), usual)

    def begin(self, instead: Sequence[int], sure: float) -> None:
        """A draft is written. instead: what else would be verified; sure: of the first of that."""
        self._instead, self._sure, self._must_try = instead, sure, False

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
    """AR steps of a batch that a pass costs; what is around a longer one is the same."""

    def __init__(self, costs: PassCosts, num_rows: int) -> None:
        self.passes, self._num_rows = costs, num_rows
        self.beside = 0.0 if costs.step_s is None else _BESIDE_S / (costs.step_s + _BESIDE_S)
        """The share of an AR step of one row that is no pass; 0 where that was not measured."""
        share = 1 - self.beside
        self._tokens = {most: 1 + (cost - 1) * share for most, cost in costs.tokens.items()}
        self._row = costs.row * share
        self._drafts: dict[tuple[int, int], tuple[list[float], list[float]]] = {}

    def of_pass(self, num_tokens: int, num_rows: int | None = None) -> float:
        """Over num_tokens of each of num_rows rows, of all if not given; other rows wait for it."""
        every = self._num_rows
        rows = every if num_rows is None else min(every, num_rows)
        return self._cost(num_tokens * rows, rows) / self._cost(every, every)

    def of_drafts(self, num_known: int, most: int) -> tuple[list[float], list[float]]:
        """Of passes over the known tokens and 0, 1 ... `most` drafted ones of each row; and what
        each further one costs from there on, at the least.
        """
        key = num_known, most
        if key not in self._drafts:
            costs = [self.of_pass(num_known + count) for count in range(most + 1)]
            more = [
                min((cost - own) / count for count, cost in enumerate(costs[at + 1 :], 1))
                for at, own in enumerate(costs[:-1])
            ]
            self._drafts[key] = costs, [*more, math.inf]
        return self._drafts[key]

    def _cost(self, num_tokens: int, num_rows: int) -> float:
        """AR steps of one row alone."""
        rows = self._row * (num_rows - 1)
        for most, cost in self._tokens.items():
            if num_tokens <= most:
                return cost + rows
        return cost * num_tokens / most + rows


class Drafting(NamedTuple):
    """What decides about the drafts of a batch."""

    costs: BatchCosts
    sampler: Sampler  # without chance: the context tower has the last word
    may_branch: bool
