"""Prompt lookup: what followed the newest tokens where they occurred before."""

import itertools
import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower.engine.batch import Batch
from twotower.engine.drafts import BatchCosts, Proposal
from twotower.engine.drafts_lookup import (
    MAX_MATCH,
    MAX_TRIED,
    MIN_MATCH,
    Candidates,
    Guess,
    Lookup,
    LookupIndex,
)
from twotower.engine.proposals import propose, worth_verifying
from twotower.engine.resolved import ResolvedOptions
from twotower.engine.row import Row
from twotower.model.backend import PassCosts
from twotower.model.ngrams import Ngrams, context_keys


def index_of(text: list[int]) -> LookupIndex:
    index = LookupIndex()
    index.extend(text)
    return index


def test_the_longest_match_wins_and_the_newest_of_equals() -> None:
    text = [1, 2, 3, 50, 9, 2, 3, 60, 8, 2, 3, 70, 1, 2, 3]
    assert index_of(text).find([], 2) == (3, [50, 9])  # 1 2 3, not the newer 2 3
    assert index_of([9, *text[5:]]).find([], 2) == (2, [70, 1])  # of three, the newest


def test_what_is_known_already_counts_as_text() -> None:
    """Guards drafts behind what a grammar demands."""
    assert index_of([1, 2, 3, 4, 5, 1, 2]).find([3], 2) == (3, [4, 5])
    assert index_of([1, 2, 3, 4, 5, 9]).find([2, 3], 2) == (2, [4, 5])
    assert index_of([]).find([7], 3) == index_of([7]).find([], 3) == (0, [])


def test_a_loop_goes_on_as_it_turns() -> None:
    """Guards texts that repeat: the newest occurrence ends where the text does."""
    assert index_of([5, 1, 2, 1, 2, 1]).find([], 5) == (3, [2, 1, 2, 1, 2])
    assert index_of([5, 7, 7, 7]).find([], 4) == (2, [7, 7, 7, 7])


def test_the_first_tokens_are_found() -> None:
    assert index_of([1, 2, 9, 1, 2]).find([], 1) == (2, [9])


COSTS = PassCosts({1: 1.0, 4: 1.2, 8: 1.4, 16: 2.0})


def told(guesses: Iterator[Guess]) -> tuple[list[int], list[int], list[float]]:
    """Tokens, what they follow, and how probable they are."""
    found = [*guesses]
    return [g.token for g in found], [g.parent for g in found], [g.sure for g in found]


def proposal_of(
    row: Row, batch: Batch, drafted: Sequence[Candidates] = (), writing: float = 0.0
) -> Proposal:
    """What is verified of a row alone."""
    return propose(batch, [row], [[1]], [drafted] if drafted else (), (), writing)[0]


def batch_with(ngrams: Ngrams | None, costs: PassCosts = COSTS) -> Batch:
    """What a lookup asks of a batch."""
    model = SimpleNamespace(
        pass_costs=costs, context_device=torch.device("cpu"), verifies_trees=False,
        config=SimpleNamespace(mask_token_id=0),
    )  # fmt: skip
    row = Row(0, [1], ResolvedOptions())
    known = [] if ngrams is None else [ngrams]
    return Batch(model, None, [row], None, ngrams=known)  # type: ignore[arg-type]


def ngrams_of(*known: tuple[list[int], int, float]) -> Ngrams:
    """n-grams: a context, the token behind it, its probability."""
    rows = sorted((context_keys(context[::-1])[-1], *rest) for context, *rest in known)
    keys, tokens, probabilities = zip(*rows, strict=True)
    return Ngrams(
        np.array(keys, np.uint32), np.array(tokens, np.int32), np.array(probabilities, np.float32)
    )


def test_the_index_follows_the_row() -> None:
    """Guards an index that holds tokens twice, or not those of the newest cycle."""
    row, batch = Row(0, [1, 2, 3], ResolvedOptions(drafts="lookup")), batch_with(None)
    for new, expected in (([1], None), ([2], (3, 1, 2)), ([3], (1, 2, 3)), ([5], None)):
        row.tokens += new
        proposal = proposal_of(row, batch)
        assert tuple(proposal.tokens[:3]) == (expected or ())
        assert row.lookup is not None and row.lookup.num_tokens == 3 + len(row.tokens)
    row = Row(0, [1, 2, 3, 1, 2], ResolvedOptions(drafts="denoiser"))
    assert proposal_of(row, batch)[1:] == ([], [], 1, 1.0, 0.0)


def test_longer_matches_have_longer_drafts() -> None:
    """Guards the cost of drafts that are seldom right beyond their first tokens."""
    text = list(range(100, 140))
    for match, expected in ((2, 7), (4, 7), (16, 15)):
        row = Row(0, [*text, 7, *text[:match]], ResolvedOptions())
        proposal = proposal_of(row, batch_with(None))
        assert proposal.expected > 1.5
        assert list(proposal.tokens) == text[match : match + expected]


def test_drafts_end_where_the_text_does() -> None:
    """Guards passes over tokens that may no longer be written."""
    text = list(range(100, 120))
    for most, expected in ((1, 0), (2, 1), (4, 3), (9, 7)):
        row = Row(0, [*text, *text[:8]], ResolvedOptions(max_new_tokens=most))
        proposal = proposal_of(row, batch_with(None))
        assert len(proposal.tokens) == expected


def test_ngrams_go_on_where_the_text_says_nothing() -> None:
    """Guards the chain: each token is looked up behind the one before it, the longest context that
    is known first, and the text's own account counts where it is the surer.
    """
    ngrams = ngrams_of(([7], 8, 0.9), ([7, 8], 9, 0.6), ([8], 5, 0.9), ([9], 4, 0.3))
    lookup = Lookup([ngrams])
    lookup.extend([1, 2, 7])
    tokens, parents, sure = told(lookup.guesses([], 3))
    assert tokens == [8, 9, 4] and sure == pytest.approx([0.9, 0.54, 0.162])
    assert parents == [-1, 0, 1]
    assert told(lookup.guesses([8], 2))[:2] == ([9, 4], [0, 1])
    lookup.extend([1, 2])  # before it came 7
    assert told(lookup.guesses([], 3))[0] == [7, 8, 9]
    assert not [*Lookup().guesses([7], 3)]


def test_a_row_learns_what_its_lookups_are_worth() -> None:
    """Guards texts that never go on as before: they are drafted no more, and again when they do."""
    ngrams = ngrams_of(([7], 8, 0.6))
    row, batch = Row(0, [1], ResolvedOptions(max_new_tokens=1000)), batch_with(ngrams)
    drafted = []
    for token in [3] * 40 + [8] * 60:
        row.tokens += [7]
        drafted.append(len(proposal_of(row, batch).tokens) > 0)
        row.tokens += [token, len(drafted) + 100]
    assert drafted[0] and not any(drafted[30:40]) and all(drafted[90:])


@pytest.mark.parametrize(
    ("sure", "lengths"),
    [([0.9, 0.9, 0.9], (3, 3)), ([0.02, 0.9, 0.9], (0, 1)), ([0.5, 0.2, 0.2], (1, 2))],
)
def test_draft_lengths(sure: list[float], lengths: tuple[int, int]) -> None:
    """Guards drafts that are verified beyond what pays, or cut where more costs nothing: behind a
    free draft, and behind one that took 10 AR steps.
    """
    drafted, found = [[own] for own in zip([7, 8, 9], sure, strict=True)], []
    for writing in (0.0, 10.0):
        row = Row(0, [5], ResolvedOptions(drafts="denoiser"))
        costs = PassCosts({1: 1.0, 2: 1.1, 3: 1.3, 4: 1.6})
        tokens = proposal_of(row, batch_with(None, costs), drafted, writing).tokens
        assert tokens == [7, 8, 9][: len(tokens)]
        found.append(len(tokens))
    assert tuple(found) == lengths


def test_the_likeliest_of_all_that_is_known_is_drafted() -> None:
    """Guards what the denoiser has drafted: it goes on behind a surer token only where it had that,
    and where nothing else is allowed it stands alone.
    """
    ngrams = ngrams_of(([7], 8, 0.9), ([8], 9, 0.3))
    for drafted, expected in (
        ([(8, 0.5), (6, 0.7), (4, 0.6)], [8, 6, 4]),
        ([(5, 0.5), (6, 0.7), (4, 0.6)], [8, 9]),
        ([(5, 0.95), (6, 0.7), (4, 0.6)], [5, 6, 4]),
    ):
        lookup = Lookup([ngrams])
        lookup.extend([1, 7])
        assert told(lookup.guesses([], 3, [[own] for own in drafted]))[0] == expected
    alone = Lookup(copies=False)
    alone.extend([1, 2, 3, 1, 2])
    assert not [*alone.guesses([], 3)]
    assert told(alone.guesses([], 3, [[(5, 0.2)], [(6, 0.7)]]))[0] == [5, 6]


TOLD = [[(8, 0.5), (5, 0.3), (6, 0.25)], [(4, 0.9), (3, 0.02)], [(2, 0.9), (1, 0.01)]]


def test_a_draft_branches_where_the_denoiser_is_unsure() -> None:
    """Guards the order of branches: the likeliest tokens first, each behind its parent, and what
    the denoiser wrote behind a token only there.
    """
    tokens, parents, sure = told(Lookup(copies=False).guesses([], 5, TOLD, most_ways=3))
    assert (tokens, parents) == ([8, 4, 2, 5, 6], [-1, 0, 1, -1, -1])
    assert sure == pytest.approx([0.5, 0.45, 0.405, 0.18, 0.15])
    tokens, parents, _ = told(Lookup(copies=False).guesses([9], 3, TOLD, most_ways=2))
    assert (tokens, parents) == ([8, 4, 2], [0, 1, 2])  # the known token is number 0
    lookup = Lookup([ngrams_of(([9], 8, 0.9))], copies=False)
    tokens, parents, sure = told(lookup.guesses([9], 4, TOLD, most_ways=2))
    assert tokens == [8, 4, 2, 5] and parents == [0, 1, 2, 0]  # 8, told twice, is one
    assert sure[0] == pytest.approx(0.9)
    lookup = Lookup([ngrams_of(([5], 7, 0.9))], copies=False)
    tokens, parents, _ = told(lookup.guesses([], 5, TOLD, most_ways=2))
    assert tokens == [8, 4, 2, 5, 7] and parents == [-1, 0, 1, -1, 3]


def test_no_branch_for_what_ends_a_text() -> None:
    """Guards tokens of a pass: what ends a text is the tower's own choice behind a draft."""
    guesses = Lookup(copies=False).guesses([], 9, TOLD, most_ways=3, ends={5, 4})
    assert told(guesses)[:2] == ([8, 6, 3], [-1, -1, 0])


def test_guesses_are_judged_along_the_branch_that_was_right() -> None:
    """Guards a row's own rates: of a branch that was not taken nothing can be learnt."""
    lookup = Lookup([ngrams_of(([5], 7, 0.9), ([7], 6, 0.9), ([8], 3, 0.9))], copies=False)
    for text in ([5, 7, 9], [8, 3]):
        told(lookup.guesses([], 9, TOLD[:1], most_ways=2))
        lookup.extend(text)
    assert lookup._judged[("denoiser", 4)] == (2, 1)  # tried, right: 8 was right once
    assert lookup._judged[(Ngrams, 7)] == (3, 2)  # 7, not 6; 3


def test_no_match_of_one_token() -> None:
    assert index_of([1, 2, 3, 1]).find([], 5) == (0, [])


@given(text=st.lists(st.integers(0, 2), max_size=40), cut=st.integers(0, 40))
def test_equals_the_search_of_the_whole_text(text: list[int], cut: int) -> None:
    """Guards the index, which is built piece by piece, against the search that it replaces."""
    index = index_of(text[:cut])
    index.extend(text[cut:])
    length, draft = index.find([], 4)
    found = [
        (count, at)
        for at in range(2, len(text))
        for count in range(MIN_MATCH, min(at, MAX_MATCH) + 1)
        if text[at - count : at] == text[len(text) - count :]
    ]
    if not found:
        assert (length, draft) == (0, [])
        return
    tried = sorted({at for _, at in found}, reverse=True)[:MAX_TRIED]
    expected, at = max((count, at) for count, at in found if at in tried)
    assert length == expected
    repeated = text[at:] * 4
    assert draft == repeated[:4]


@pytest.mark.parametrize("is_padded", [False, True])
def test_no_other_lengths_yield_more(is_padded: bool) -> None:
    """Guards the tokens a second of a batch: one row's draft filled a pass of 32 tokens for all 16
    rows, as if the others had drafts as long; and what each row has at hand, of which no more is
    looked up than may pay.
    """
    rng, num_asked, num_all = random.Random(5), 0, 0
    for _ in range(300):
        steps = sorted(rng.uniform(1, 1 + rng.choice([0.5, 4.0])) for _ in range(4))
        passes = PassCosts({1: 1.0, **dict(zip((2, 4, 8, 16), steps, strict=True))}, row=0.1)
        costs, writing = BatchCosts(passes._replace(is_padded=is_padded)), rng.choice([0.0, 0.4])
        begin = [rng.randrange(1, 3) for _ in range(3)]
        rates = [
            [
                *itertools.accumulate(
                    (rng.random() for _ in range(rng.randrange(6))), lambda a, b: a * b
                )
            ]
            for _ in begin
        ]
        asked: list[int] = []

        def guesses(own: list[float], asked: list[int] = asked) -> Iterator[Guess]:
            for at, sure in enumerate(own):
                asked.append(at)
                yield Guess(at, at - 1, sure)

        found = worth_verifying(begin, sum(begin), [*map(guesses, rates)], costs, writing)

        def gain(
            counts: Sequence[int],
            begin: list[int] = begin,
            rates: list[list[float]] = rates,
            costs: BatchCosts = costs,
            writing: float = writing,
        ) -> float:
            expected = sum(begin) + sum(sum(own[:n]) for n, own in zip(counts, rates, strict=True))
            lengths = [own + n for n, own in zip(counts, begin, strict=True)]
            return expected / (writing + costs.of_pass(lengths))

        best = max(map(gain, itertools.product(*(range(len(own) + 1) for own in rates))))
        assert gain([*map(len, found)]) == pytest.approx(best)
        assert all(
            [g.sure for g in own] == r[: len(own)] for own, r in zip(found, rates, strict=True)
        )
        num_asked, num_all = num_asked + len(asked), num_all + sum(map(len, rates))
    assert is_padded or num_asked < 0.9 * num_all
