"""Prompt lookup: what followed the newest tokens where they occurred before."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from twotower.engine.drafts_lookup import LEAST_MATCH, MOST_MATCH, MOST_TRIED, LookupIndex, propose
from twotower.engine.options import ResolvedOptions
from twotower.engine.request import Row


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


def test_the_index_follows_the_row() -> None:
    """Guards an index that holds tokens twice, or not those of the newest cycle."""
    row = Row(0, [1, 2, 3], ResolvedOptions(drafts="lookup"))
    batch = SimpleNamespace()
    for new, expected in (([1], None), ([2], (3, 1)), ([3], (1, 2)), ([3], None)):
        row.tokens += new
        proposal = propose(row, batch, [], room=2)  # type: ignore[arg-type]
        assert (proposal and tuple(proposal.tokens)) == expected
        assert row.lookup is not None and row.lookup.num_tokens == 3 + len(row.tokens)
    assert sorted(row.controllers) == ["lookup 2", "lookup 3"]
    row.options = ResolvedOptions(drafts="denoiser")
    assert propose(row, batch, [1, 2], room=2) is None  # type: ignore[arg-type]


def test_longer_matches_have_longer_drafts() -> None:
    """Guards the cost of drafts that are seldom right beyond their first tokens."""
    text = list(range(100, 140))
    for match, expected in ((2, 3), (3, 3), (4, 3), (5, 7), (7, 7), (8, 15), (9, 15)):
        row = Row(0, [*text, 7, *text[:match]], ResolvedOptions())
        proposal = propose(row, SimpleNamespace(), [], room=20)  # type: ignore[arg-type]
        assert proposal is not None and proposal.cost == 0
        assert list(proposal.tokens) == text[match : match + expected]


def test_no_match_of_one_token() -> None:
    assert index_of([1, 2, 3, 1]).find([], 5) == (0, [])


@given(text=st.lists(st.integers(0, 2), max_size=40), cut=st.integers(0, 40))
def test_equals_the_search_of_the_whole_text(text: list[int], cut: int) -> None:
    """Guards the index, which is built piece by piece, against the search that it replaces."""
    index = index_of(text[:cut])
    index.extend(text[cut:])
    length, draft = index.find([], 4)
    places = [
        (count, at)
        for at in range(2, len(text))
        for count in range(LEAST_MATCH, min(at, MOST_MATCH) + 1)
        if text[at - count : at] == text[len(text) - count :]
    ]
    if not places:
        assert (length, draft) == (0, [])
        return
    tried = sorted({at for _, at in places}, reverse=True)[:MOST_TRIED]
    expected, at = max((count, at) for count, at in places if at in tried)
    assert length == expected
    repeated = text[at:] * 4
    assert draft == repeated[:4]
