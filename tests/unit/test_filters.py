"""Filters: what they match, how much they keep back, what they refuse."""

import pytest

from tiny_text import byte_tokenizer, ids_of, tiny_tokenizer
from twotower import GenerateOptions
from twotower.engine.events import Completion, TokensCommitted
from twotower.engine.filters import (
    MAX_MATCH_CHARS,
    Filter,
    FilterFailed,
    function_filter,
    pattern_filter,
)
from twotower.engine.resolved import resolve_options
from twotower.engine.row import Row, RowText

EOS = 2


def find_word(text: str) -> int | None:
    """A filter as a user writes one: the word "bad" in any case."""
    at = text.lower().find("bad")
    return None if at < 0 else at


def find_nothing(text: str) -> int | None:
    return None


def fail(text: str) -> int | None:
    raise KeyError(text)


def find_outside(text: str) -> int | None:
    return len(text) + 1


NOT_A_FUNCTION = 5


def first_match(one: Filter, text: str) -> tuple[int, int] | None:
    """Where the filter cuts a text, and how many characters it has seen then."""
    for end in range(1, len(text) + 1):
        start = one.find(text, end, False)
        if start is not None:
            return start, end
    start = one.find(text, len(text), True)
    return None if start is None else (start, len(text))


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("bad", "a bad day", (2, 5)),
        ("bad", "ba d", None),
        ("(?i)bad", "BaD", (0, 3)),
        ("ab+c?", "xabbbc", (1, 3)),  # at its first characters
        ("b|cabx", "cabx", (2, 3)),  # what is complete first, not what begins first
        ("(?<=x)y", "xy", (1, 2)),
        ("^bad", "bad bad", (0, 3)),
        ("^bad", "a bad", None),
        (r"\bbad", "abad bad", (5, 8)),
        (r"\bbad\b", "badly", None),
        (r"\bbad\b", "bad.", (0, 4)),  # the character behind decides
        (r"\bbad\b", "not bad", (4, 7)),  # at the end of the text
        (r"\bbad\b", "badly bad ", (6, 10)),
        (r"bad\B", "bad badly", (4, 8)),
        ("bad$", "bad bad", (4, 7)),
        ("(?m)bad$", "bad\nx", (0, 4)),
        (r"\bba\b|\bad\b", "bad ad", (4, 6)),
        (r"\bbad\b.*", "bad things", (0, 4)),  # a match that could go on is one already
        (r"(a)\1", "abaa", (2, 4)),
    ],
)
def test_patterns(pattern: str, text: str, found: tuple[int, int] | None) -> None:
    assert first_match(pattern_filter(pattern), text) == found


@pytest.mark.parametrize(
    ("pattern", "held"),
    [
        ("a", 0),
        ("bad", 2),
        ("bad|worse", 4),
        ("a{2,7}", 6),
        (r"\bbad\b", 3),
        (r"\bbad", 3),
        ("a+", 99),
        ("^a", 0),
        ("(?<=x)y", 0),
    ],
)
def test_no_more_is_held_than_a_match_can_have(pattern: str, held: int) -> None:
    """Guards streaming: each held character is one that a reader waits for."""
    assert pattern_filter(pattern).num_held == held


def test_a_long_match_is_seen_within_the_bound() -> None:
    """Guards the promise on patterns without an end: a part of the length is looked through."""
    one = pattern_filter("<.*>", max_match_chars=10)
    assert one.num_held == 9
    assert first_match(one, "ab<" + 8 * "x" + ">") == (2, 12)
    assert first_match(one, "ab<" + 9 * "x" + ">") is None
    assert first_match(one, "ab<" + 9 * "x" + "<y>") == (12, 15)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "is not a regular expression"),
        ("a*", "can match empty text"),
        ("", "can match empty text"),
        ("a|", "can match empty text"),
        (r"\b", "can match empty text"),
        ("(?<=a)", "can match empty text"),
        ("a(?=b)", "looks ahead"),
        ("(x|a(?!b))c", "looks ahead"),
        ("((?:(?:y(?=b)))+)", "looks ahead"),
    ],
)
def test_bad_patterns(pattern: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        pattern_filter(pattern)
    assert str(error.value).startswith(f"filter: {pattern!r} ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chars", [0, -1, MAX_MATCH_CHARS + 1])
def test_the_bound_has_bounds(chars: int) -> None:
    with pytest.raises(ValueError, match=f"max_match_chars={chars} must be between 1 and 10000"):
        pattern_filter("a+", max_match_chars=chars)
    with pytest.raises(ValueError, match=f"max_match_chars={chars}"):
        function_filter(f"{__name__}:find_word", max_match_chars=chars)


def test_a_function_of_the_users() -> None:
    one = function_filter(f"{__name__}:find_word", max_match_chars=5)
    assert one.num_held == 4
    assert first_match(one, "a BAD day") == (2, 5)
    assert first_match(function_filter(f"{__name__}:find_nothing"), "a bad day") is None


def test_a_function_cannot_take_back_what_was_shown() -> None:
    one = function_filter(f"{__name__}:find_word", max_match_chars=2)
    assert first_match(one, "a bad day") == (3, 5)


@pytest.mark.parametrize(
    "entry_point", ["nowhere:f", f"{__name__}:nothing", f"{__name__}:NOT_A_FUNCTION", "f", "", ":"]
)
def test_functions_that_are_none(entry_point: str) -> None:
    with pytest.raises(ValueError, match=r"filter: .*module:function"):
        function_filter(entry_point)


@pytest.mark.parametrize("name", ["fail", "find_outside"])
def test_a_function_that_fails_ends_the_row(name: str) -> None:
    """Guards against text that goes out unseen because its filter is broken."""
    own = row(function_filter(f"{__name__}:{name}"))
    with pytest.raises(FilterFailed, match=rf"filter: .*:{name} ") as error:
        own.commit(ids_of("abc"))
    assert "abc" not in str(error.value)


def row(*filters: Filter, stop: str | None = None, length: int = 30) -> Row:
    given = GenerateOptions(stop=stop, max_new_tokens=length, eos_token_id=EOS)
    options = resolve_options(given, {})
    return Row(0, [5], options, RowText(tiny_tokenizer(), options.stop, filters))


def feed(own: Row, *blocks: list[int]) -> tuple[list[TokensCommitted], Completion | None]:
    events = []
    for block in blocks:
        events.append(own.commit(block))
        if own.is_finished:
            return events, own.finished().completion
    return events, None


def test_a_match_ends_the_row_before_it() -> None:
    """Guards a match that two blocks share: its first half must not be out when it is seen."""
    events, done = feed(row(pattern_filter("cab")), ids_of("a", "bc"), ids_of("a", "bbb"))
    assert [event.text for event in events] == ["a", "b"]
    assert done is not None
    assert (done.text, done.finish_reason) == ("ab", "content_filter")


def test_tokens_are_held_as_their_text_is() -> None:
    """Guards the other way out: the ids of the tokens, which anyone can read."""
    events, done = feed(
        row(pattern_filter("cab")), ids_of("a", "b", "bc"), ids_of("c"), ids_of("ab", "b")
    )
    assert [event.tokens for event in events] == [ids_of("a", "b"), [], ids_of("bc")]
    assert done is not None
    assert done.tokens == ids_of("a", "b", "bc")
    assert done.text == "abbc"


def test_held_text_comes_at_the_end() -> None:
    events, done = feed(row(pattern_filter("cab")), ids_of("c", "a"), [*ids_of("c"), EOS])
    assert [event.text for event in events] == ["", "cac"]
    assert [event.tokens for event in events] == [[], [*ids_of("c", "a", "c"), EOS]]
    assert done is not None
    assert (done.text, done.finish_reason) == ("cac", "eos")


def test_the_end_of_the_text_can_complete_a_match() -> None:
    """Guards a word at the very end, whose boundary is the end itself."""
    one = pattern_filter(r"\bcab\b")
    for end in ([EOS], ids_of("a")):
        events, done = feed(row(one, length=3), ids_of("c", "ab"), end)
        is_word = end == [EOS]
        assert "".join(event.text for event in events) == ("" if is_word else "caba")
        assert done is not None
        assert done.finish_reason == ("content_filter" if is_word else "length")


@pytest.mark.parametrize(
    ("pattern", "stop", "text", "reason"),
    [
        ("b", "c", "a", "content_filter"),  # the match is complete first
        ("bcb", "c", "aab", "stop"),  # it never is: the text ends before
        ("bc", "c", "aa", "content_filter"),  # both at once: what begins first
        ("c", "bc", "aa", "stop"),
        ("bc", "bc", "aa", "content_filter"),
        (r"a\b", "bc", "a", "content_filter"),  # a match because the stop cuts the text
    ],
)
def test_filters_and_stops(pattern: str, stop: str, text: str, reason: str) -> None:
    one, tokens = pattern_filter(pattern), ids_of("a", "a", "b", "c", "b")
    if pattern == "b":
        tokens = tokens[1:]
    for blocks in ([tokens], [[token] for token in tokens]):
        events, done = feed(row(one, stop=stop), *blocks)
        assert done is not None
        assert (done.text, done.finish_reason) == (text, reason)
        assert "".join(event.text for event in events) == text


def test_what_a_stop_may_cut_is_held_for_the_filters_too() -> None:
    """Guards a word whose end is a stop string that is still incomplete."""
    events, done = feed(
        row(pattern_filter(r"\bcab\b"), stop="aaaa"),
        ids_of("c", "a", "b"),
        ids_of("a", "a", "a"),
        ids_of("a"),
    )
    assert [event.text for event in events] == ["", "", ""]
    assert done is not None
    assert (done.text, done.finish_reason) == ("", "content_filter")


def test_a_stops_own_text_is_not_released() -> None:
    """Guards what stands behind a stop in its token: no filter has seen it."""
    _, done = feed(row(pattern_filter("cccc"), stop="b"), ids_of("a", "bcc"))
    assert done is not None
    assert (done.tokens, done.text, done.finish_reason) == (ids_of("a"), "a", "stop")


def test_a_match_of_half_characters() -> None:
    """Guards a character of two tokens, of which the first must not be out alone."""
    tokenizer = byte_tokenizer()
    first, second = tokenizer.encode("\u00e9")
    letter = tokenizer.encode("a")[0]
    for pattern, tokens in (("\u00e9", [letter]), ("x", [letter, first, second])):
        options = resolve_options(GenerateOptions(max_new_tokens=3), {})
        own = Row(0, [5], options, RowText(tokenizer, (), (pattern_filter(pattern),)))
        assert own.commit([letter, first]).tokens == [letter]
        own.commit([second])
        assert own.finished().completion.tokens == tokens


def test_rows_without_filters_hold_nothing() -> None:
    events, _ = feed(row(), ids_of("a", "b"), ids_of("c"))
    assert [event.tokens for event in events] == [ids_of("a", "b"), ids_of("c")]
    assert not row().text.is_filtered
    assert row(pattern_filter("a")).text.is_filtered
