"""The tokenizer: round trips, special tokens, streaming, files, errors."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from twotower.tokenizer import (
    MIN_VOCAB_SIZE,
    load_tokenizer,
    read_chat_template,
    train_tokenizer,
)

TEXTS = [
    "the cat sat on the mat 12345",
    "def add(a, b):\n    return a + b",
    "süß, naïve, 日本語 🎉",
]
VOCAB_SIZE = 300
tokenizer = train_tokenizer(TEXTS * 5, VOCAB_SIZE)


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    """Silent failure: a character outside the training text is dropped or replaced."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, tokenizer.vocab_size - 1)), st.lists(st.integers(1, 4), min_size=1))
def test_streamed_pieces_equal_whole_decode(ids: list[int], sizes: list[int]) -> None:
    """Silent failure: streaming loses, doubles or alters text at the borders of its pieces."""
    stream, pieces, start, turn = tokenizer.stream(), [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(ids[start : start + size]))
        start, turn = start + size, turn + 1
    assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids)


@given(st.text(alphabet="aé日🎉 1"))
def test_stream_never_returns_half_a_character(text: str) -> None:
    """Silent failure: a multi-byte character arrives as two replacement marks."""
    stream = tokenizer.stream()
    pieces = [stream.push([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text  # complete without the flush
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_ids_are_the_agreed_ones() -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("name", ["<pad>", "<bos>", "<eos>", "<mask>"])
def test_special_names_in_text_stay_text(name: str) -> None:
    """Silent failure: a prompt that mentions <eos> ends itself, or <mask> opens a hole in it."""
    ids = tokenizer.encode(f"a {name} b")
    assert min(ids) > 3
    assert tokenizer.decode(ids) == f"a {name} b"
    assert tokenizer.encode_batch([f"a {name} b"]) == [ids]


def test_special_names_become_ids_when_allowed() -> None:
    ids = tokenizer.encode("a<mask>", allow_special=True)
    assert ids[-1] == 3
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special=False) == "a<mask>"


def test_every_digit_is_a_token() -> None:
    """Silent failure: "12345" becomes one token and arithmetic cannot be learnt."""
    ids = tokenizer.encode("12345")
    assert [tokenizer.decode([token]) for token in ids] == list("12345")


def test_add_bos_and_no_prefix_space() -> None:
    assert tokenizer.encode("cat", add_bos=True) == [1, *tokenizer.encode("cat")]
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("cat")) == "cat"


def test_training_is_repeatable_and_merges() -> None:
    again = train_tokenizer(TEXTS * 5, VOCAB_SIZE)
    assert again.fingerprint == tokenizer.fingerprint
    assert len(tokenizer.encode("the cat sat")) < len("the cat sat")
    assert train_tokenizer(TEXTS * 5, 290).fingerprint != tokenizer.fingerprint


def test_small_text_gives_fewer_tokens_than_asked() -> None:
    assert train_tokenizer(["ab"], 1000).vocab_size == MIN_VOCAB_SIZE + 1  # the bytes and "ab"


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("naïve <mask>") == tokenizer.encode("naïve <mask>")
        assert loaded.mask_id == 3


@pytest.mark.parametrize("is_named", [True, False], ids=["in the config", "in its own file"])
def test_a_chat_template_stays_with_its_tokenizer(is_named: bool, tmp_path: Path) -> None:
    """Silent failure: a model that was loaded and saved, or trained on, answers no chat."""
    folder, text = tmp_path / "a", "{{ messages[0].content }}\u00e4"
    tokenizer.save(folder)
    if is_named:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        named = json.dumps(config | {"chat_template": text})
        (folder / "tokenizer_config.json").write_text(named)
    else:
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    found = load_tokenizer(folder)
    for one in (found, found.with_roles({"eos": "<pad>"}), found.within(9)):
        assert one.chat_template == text
        one.save(tmp_path / "b")
        assert read_chat_template(tmp_path / "b")[0] == text
        tokenizer.save(tmp_path / "b")  # which has none
        assert read_chat_template(tmp_path / "b")[0] is None
    assert tokenizer.chat_template is None and "chat_template.jinja" not in tokenizer.files()


def test_a_chat_template_that_cannot_be_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Silent failure: a damaged template keeps a model from completing texts, or is lost without a
    word."""
    tokenizer.save(tmp_path)
    for name, damaged in (
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b"x" * (2**20 + 1)),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}'),
    ):
        tokenizer.save(tmp_path)
        (tmp_path / name).write_bytes(damaged)
        caplog.clear()
        assert load_tokenizer(tmp_path).chat_template is None
        assert f"chat_template of {tmp_path} is left out: " in caplog.text


def test_roles_come_from_the_config_file(tmp_path: Path) -> None:
    """Other models name their special tokens otherwise, as strings or as objects."""
    tokenizer.save(tmp_path)
    config = {"eos_token": {"content": "<pad>"}, "bos_token": "<mask>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.bos_id) == (0, 3)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_id == 2


def test_absent_roles_are_none_and_add_bos_says_so(tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nothing>"}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.bos_id is None
    with pytest.raises(ValueError, match="add_bos"):
        loaded.encode("a", add_bos=True)


def _folder_with(folder: Path, content: bytes | None) -> Path:
    if content is not None:
        (folder / "tokenizer.json").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "no 'model'"),
        (b'{"model": {"type": "BPE"}}', "cannot be read"),
    ],
)
def test_unreadable_files_are_one_clear_line(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(_folder_with(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1 << 40])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([5, token])


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 260"):
        train_tokenizer(TEXTS, MIN_VOCAB_SIZE - 1)


def test_token_text_shows_special_tokens() -> None:
    assert tokenizer.token_text(3) == "<mask>"


@given(st.lists(st.integers(0, VOCAB_SIZE - 1)))
def test_bytes_of_tokens_are_those_of_the_text(ids: list[int]) -> None:
    """Silent failure: a token that is a part of a character is shown with the bytes of U+FFFD."""
    data = b"".join(tokenizer.token_bytes(token) for token in ids)
    library = tokenizers.Tokenizer.from_str(tokenizer.json_text)
    assert data.decode("utf-8", "replace") == library.decode(ids, skip_special_tokens=False)


def test_parts_of_a_character_have_their_own_bytes() -> None:
    ids = train_tokenizer(["abc"], 270).encode("\U0001f389\n")
    parts = [train_tokenizer(["abc"], 270).token_bytes(token) for token in ids]
    assert parts == [b"\xf0", b"\x9f", b"\x8e", b"\x89", b"\n"]
