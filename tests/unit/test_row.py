"""One row: where it ends, what text it shows when, with stop strings across tokens and blocks."""

import pytest

from tiny_text import ids_of, tiny_tokenizer
from twotower import Completion, GenerateOptions
from twotower.engine import resolve_options
from twotower.engine.events import Verified
from twotower.engine.row import Row, RowText

EOS = 2


def row(stop: str | tuple[str, ...] | None = None, length: int = 20, text: bool = True) -> Row:
    options = GenerateOptions(stop=stop, max_new_tokens=length, eos_token_id=EOS)
    resolved = resolve_options(options, {})
    return Row(0, [5], resolved, RowText(tiny_tokenizer() if text else None, resolved.stop))


def feed(r: Row, *blocks: list[int]) -> tuple[list[str], Completion | None]:
    """Commit blocks until the row ends: the text shown at each, and the completion if it ended."""
    shown = []
    for block in blocks:
        shown.append(r.commit(block).text)
        if r.is_finished:
            return shown, r.finished().completion
    return shown, None


def test_length_cuts_the_last_block() -> None:
    r = row(length=5)
    shown, done = feed(r, ids_of("a", "b", "c"), ids_of("aa", "b", "c"))
    assert shown == ["abc", "aab"]
    assert done is not None
    assert (done.tokens, done.text) == (ids_of("a", "b", "c", "aa", "b"), "abcaab")
    assert done.finish_reason == "length"


def test_what_stands_behind_the_end_is_not_rejected() -> None:
    """Guards filler behind the end of a text that counts, and is shown, as refused."""
    r = row()
    assert r.commit(ids_of("a", "b"), verified=Verified(rejected=2)).rejected == 2
    assert r.commit([*ids_of("c"), EOS], verified=Verified(rejected=2)).rejected == 0
    cut = row(length=2)
    assert cut.commit(ids_of("a", "b", "c"), verified=Verified(rejected=1)).rejected == 0
    assert row().commit(ids_of("a")).rejected is None


def test_eos_is_the_last_token_and_no_text() -> None:
    """Guards the official code's difference: what follows EOS inside a block is dropped."""
    r = row()
    event = r.commit([*ids_of("a"), EOS, *ids_of("b", "c")])
    assert (event.tokens, event.text) == ([*ids_of("a"), EOS], "a")
    done = r.finished().completion
    assert (done.tokens, done.text, done.finish_reason) == ([*ids_of("a"), EOS], "a", "eos")


def test_eos_at_the_very_length_counts_as_eos() -> None:
    _, done = feed(row(length=2), [*ids_of("a"), EOS, *ids_of("b")])
    assert done is not None
    assert (done.finish_reason, len(done.tokens)) == ("eos", 2)


@pytest.mark.parametrize(
    ("stop", "blocks", "shown", "text"),
    [
        ("b", [["a", "b", "c"]], ["a"], "a"),
        ("bc", [["a", "b", "c", "a"]], ["a"], "a"),  # across tokens
        ("bc", [["a", "b"], ["c", "a"]], ["a", ""], "a"),  # across blocks
        ("ca", [["abc", "ab"]], ["ab"], "ab"),  # ends inside a token
        ("bb", [["a", "b"], ["a", "c"], ["bb"]], ["a", "bac", ""], "abac"),  # a false start
        ("abc", [["ab"], ["ab"], ["c"]], ["", "ab", ""], "ab"),  # restarts inside itself
        ("aab", [["a", "a"], ["a"], ["b"]], ["", "a", ""], "a"),
        (("cc", "b"), [["a", "c"], ["b"]], ["a", "c"], "ac"),  # the first that appears
        (("abc", "b"), [["a", "b"]], ["a"], "a"),
        ("a", [["a", "b"]], [""], ""),  # at once
    ],
)
def test_stop_strings(
    stop: str | tuple[str, ...], blocks: list[list[str]], shown: list[str], text: str
) -> None:
    """Guards against text that was shown and then had to be taken back, and stops that are missed
    because tokens or blocks cut them."""
    r = row(stop)
    found, done = feed(r, *(ids_of(*block) for block in blocks))
    assert done is not None, "the row must end"
    assert (found, done.text, done.finish_reason) == (shown, text, "stop")


def test_tokens_after_a_stop_are_dropped() -> None:
    _, done = feed(row("b"), ids_of("a", "abc", "c"))
    assert done is not None
    assert done.tokens == ids_of("a", "abc"), "the token that completes the stop is the last"
    assert done.text == "aa"


def test_held_text_is_shown_at_the_end() -> None:
    """Guards the last letters: a false start of a stop string belongs to the text."""
    shown, done = feed(row("bc", length=4), ids_of("a", "b"), ids_of("a", "b"))
    assert shown == ["a", "bab"]
    assert done is not None
    assert (done.text, done.finish_reason) == ("abab", "length")


def test_a_stop_in_the_last_token_wins_over_the_length() -> None:
    _, done = feed(row("b", length=2), ids_of("a", "b"))
    assert done is not None
    assert (done.text, done.finish_reason) == ("a", "stop")


def test_without_a_tokenizer_there_is_no_text() -> None:
    shown, done = feed(row(text=False, length=2), ids_of("a", "b"))
    assert shown == [""]
    assert done is not None
    assert done.text is None


def test_commits_are_numbered_and_carry_the_counts() -> None:
    r = row()
    r.nfe, r.context_forwards = 7, 2
    first, second = r.commit(ids_of("a")), r.commit(ids_of("b"))
    assert (first.block_index, second.block_index) == (0, 1)
    assert (second.nfe, second.context_forwards, second.row) == (7, 2, 0)
    assert not r.is_finished


def test_half_characters_wait() -> None:
    """Guards streaming of byte-level text: an unfinished character is never shown."""
    from twotower.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["abc"], vocab_size=260)
    first, second = tokenizer.encode("\u00e9")
    r = Row(0, [5], resolve_options(GenerateOptions(max_new_tokens=4), {}), RowText(tokenizer))
    assert r.commit([first]).text == ""
    assert r.commit([second]).text == "\u00e9"
    r.commit([first])
    last = r.commit([first])
    assert r.finished().completion.text == "\u00e9" + last.text
    assert "\ufffd" in last.text, "what stays unfinished is shown as damaged at the end"
