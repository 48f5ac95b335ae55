"""Filters: whatever tokens and blocks bring a text, the same of it is shown, and no match."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_models import random_ids, tiny_model
from tiny_text import byte_tokenizer
from twotower import GenerateOptions, StepTaken, TokensCommitted
from twotower.engine import Event, Failed, Finished, Request, stream_requests
from twotower.engine.filters import Filter, function_filter, pattern_filter
from twotower.engine.resolved import resolve_options
from twotower.engine.row import Row, RowText

EOS = 2
# No condition on the character behind: a match in a text is one in every longer text.
PATTERNS = ["ab", "(?i)ba", "a.{0,3}b", "\u00e9+a", "a+b+", "(?<=b)a", "b|aab", "^ba", r"\ba"]
BOUNDED = [r"\bab\b", r"a\B", "b$", r"\b\u00e9\b"]
TEXTS = st.text(alphabet="ab\u00e9 B\U0001f600", max_size=24)


def find_double(text: str) -> int | None:
    """A filter of a user's: the first letter that comes twice in a row."""
    return next((i for i, pair in enumerate(itertools.pairwise(text)) if len(set(pair)) == 1), None)


FUNCTION = function_filter(f"{__name__}:find_double", max_match_chars=3)


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[str, list[list[int]]]:
    """A text and blocks of tokens that spell it: whole bytes, merged ones, and their cuts."""
    text = draw(TEXTS)
    tokenizer = byte_tokenizer()
    ids: list[int] = []
    for part in re.split(draw(st.sampled_from(["(b)", "(a)", "( )"])), text):
        ids += tokenizer.encode(part)
    if draw(st.booleans()):
        texts = {tokenizer.token_text(i): i for i in range(4, 260)}
        by_bytes = {letter: i for letter, i in texts.items() if letter.isascii()}
        ids = [j for i in ids for j in _bytes_of(i, by_bytes)]
    cuts = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=6)) | {0, len(ids)})
    return text, [ids[a:b] for a, b in itertools.pairwise(cuts)]


def _bytes_of(token: int, letters: dict[str, int]) -> list[int]:
    """A token of several letters as a token for each."""
    text = byte_tokenizer().token_text(token)
    return [letters[letter] for letter in text] if all(c in letters for c in text) else [token]


def run(
    blocks: list[list[int]], filters: tuple[Filter, ...], stop: str | None = None
) -> tuple[list[str], list[int], str, str]:
    """The texts that were shown one after the other, all tokens given out, the text, the reason."""
    given = GenerateOptions(stop=stop, max_new_tokens=1000, eos_token_id=EOS)
    options = resolve_options(given, {})
    row = Row(0, [5], options, RowText(byte_tokenizer(), options.stop, filters))
    shown, tokens = [], []
    for block in [*blocks, [EOS]]:
        event = row.commit(block)
        shown.append(event.text)
        tokens += event.tokens
        if row.is_finished:
            break
    done = row.finished().completion
    assert done.text is not None
    assert tokens == done.tokens
    return shown, tokens, done.text, done.finish_reason


def expected(text: str, pattern: str) -> str:
    """By the definition: the first beginning of the text that holds a match, cut before it."""
    for end in range(len(text) + 1):
        if match := re.search(pattern, text[:end]):
            return text[: match.start()]
    return text


@given(split_texts(), st.sampled_from(PATTERNS))
def test_what_is_shown_depends_on_the_text_alone(
    case: tuple[str, list[list[int]]], pattern: str
) -> None:
    """Guards a match that a token or a block cuts in two, of which one half gets out."""
    text, blocks = case
    shown, tokens, found, reason = run(blocks, (pattern_filter(pattern, max_match_chars=30),))
    assert found == expected(text, pattern)
    assert "".join(shown) == found
    assert (reason == "content_filter") == (re.search(pattern, text) is not None)
    for end in range(len(found) + 1):
        assert re.search(pattern, found[:end]) is None
    assert found.startswith(byte_tokenizer().decode(tokens).rstrip("\ufffd"))


@given(split_texts(), st.sampled_from(BOUNDED))
def test_conditions_on_the_character_behind(
    case: tuple[str, list[list[int]]], pattern: str
) -> None:
    """Guards words inside longer ones, which are no match, and words at the end, which are."""
    text, blocks = case
    _, _, found, reason = run(blocks, (pattern_filter(pattern),))
    match = re.search(pattern, text)
    assert found == (text if match is None else text[: match.start()])
    assert (reason == "content_filter") == (match is not None)


@given(
    split_texts(),
    st.lists(st.sampled_from([*PATTERNS, *BOUNDED]), max_size=3),
    st.sampled_from([None, "b", " a", "a\u00e9", "aa", "B \u00e9"]),
    st.booleans(),
)
def test_filters_and_stops_together(
    case: tuple[str, list[list[int]]], patterns: list[str], stop: str | None, has_function: bool
) -> None:
    """Guards the order of events: with several filters and a stop, the same ends the row however
    the text came, and what one of them cuts away is not shown for another's sake."""
    text, blocks = case
    filters = tuple(pattern_filter(pattern, 30) for pattern in patterns)
    filters += (FUNCTION,) if has_function else ()
    one_by_one = [[token] for token in byte_tokenizer().encode(text)]
    shown, _, found, reason = run(blocks, filters, stop)
    assert (found, reason) == run(one_by_one, filters, stop)[2:]
    assert "".join(shown) == found
    assert text.startswith(found)
    assert stop is None or stop not in found
    for pattern in patterns:
        assert re.search(pattern, found) is None
    assert not (has_function and find_double(found) is not None)


MODEL = tiny_model(vocab_size=byte_tokenizer().vocab_size)
PROMPT = random_ids(6, seed=2).tolist()


def decode(mode: str, *filters: Filter, **changes: object) -> list[Event]:
    values: dict[str, object] = {"max_new_tokens": 24, "logprobs": 0}
    o = GenerateOptions(mode=mode, **(values | changes))  # type: ignore[arg-type]
    return list(stream_requests(MODEL, [Request(PROMPT, o, filters)], byte_tokenizer()))


@pytest.mark.parametrize("mode", ["ar", "speculative", "diffusion"])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_of_a_match_leaves_the_engine(mode: str, seed: int) -> None:
    """Guards every way out of a row: text, tokens, log-probabilities, block states."""
    shape = {"temperature": 1.0, "seed": seed}
    (plain,) = [e.completion for e in decode(mode, **shape) if isinstance(e, Finished)]
    assert plain.text is not None
    secret = plain.text[15:19]  # wherever tokens and blocks cut it
    at = plain.text.index(secret)
    events = decode(mode, pattern_filter(re.escape(secret)), **shape)
    assert not any(isinstance(event, StepTaken) for event in events)
    (done,) = [event.completion for event in events if isinstance(event, Finished)]
    commits = [event for event in events if isinstance(event, TokensCommitted)]
    assert (done.text, done.finish_reason) == (plain.text[:at], "content_filter")
    assert "".join(event.text for event in commits) == done.text
    for event in commits:
        assert [one.token for one in event.logprobs or ()] == event.tokens
    tokens = [token for event in commits for token in event.tokens]
    assert tokens == done.tokens == plain.tokens[: len(tokens)]
    assert plain.text[:at].startswith(byte_tokenizer().decode(tokens))


def test_a_filter_without_matches_changes_nothing() -> None:
    """Guards the end of a text, which is held to the last."""
    for mode in ("ar", "diffusion"):
        (plain,) = [e.completion for e in decode(mode) if isinstance(e, Finished)]
        (found,) = [
            e.completion
            for e in decode(mode, pattern_filter("no such text.*at all"))
            if isinstance(e, Finished)
        ]
        assert found == plain


def fail(text: str) -> int | None:
    if len(text) > 5:
        raise OSError(text)
    return None


def test_a_broken_filter_ends_its_row_alone() -> None:
    """Guards the neighbours, and the row's own text: nothing more of it goes out unseen."""
    o = GenerateOptions(mode="ar", max_new_tokens=20)
    broken = function_filter(f"{__name__}:fail", max_match_chars=4)
    requests = [Request(PROMPT, o), Request(PROMPT, o, (broken,)), Request(PROMPT, o)]
    events = list(stream_requests(MODEL, requests, byte_tokenizer()))
    ends = {event.row: event for event in events if isinstance(event, Finished | Failed)}
    assert [type(ends[row]) for row in range(3)] == [Finished, Failed, Finished]
    failed = ends[1]
    assert isinstance(failed, Failed)
    assert f"{__name__}:fail failed (OSError)" in failed.message
    shown = [e.text for e in events if isinstance(e, TokensCommitted) and e.row == 1]
    assert len("".join(shown)) <= 2


def test_filters_need_a_tokenizer() -> None:
    request = Request(PROMPT, GenerateOptions(mode="ar"), (pattern_filter("a"),))
    (event,) = stream_requests(MODEL, [request])
    assert isinstance(event, Failed)
    assert "filters needs a tokenizer" in event.message
