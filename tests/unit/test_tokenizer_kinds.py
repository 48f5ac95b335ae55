"""Tokenizers of other makers: sentencepiece, word pieces, added tokens, holes, bos or none."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tiny_tokenizers import added, byte_level, llama, unigram, word_pieces, words_alone
from twotower.tokenizer import TextStream, Tokenizer, load_tokenizer


def load(folder: Path, content: dict[str, Any], config: dict[str, Any] | None = None) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def make(content: dict[str, Any]) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours, and the library's own."""
    text = json.dumps(content)
    return Tokenizer(tokenizers.Tokenizer.from_str(text)), tokenizers.Tokenizer.from_str(text)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (llama(), "a ab b\n\u65e5\U0001f389 a"),
        (unigram(), "a ab b \u65e5"),
        (word_pieces(), "ab a. b"),
        (words_alone(), "a b a"),
        (byte_level(), "a b\n\U0001f389<think>x"),
    ],
    ids=["llama", "unigram", "word pieces", "words", "byte level"],
)
def test_texts_are_decoded_as_the_library_does(content: dict[str, Any], text: str) -> None:
    """Silent failure: spaces or characters are lost between tokens that are read one by one."""
    ours, library = make(content)
    ids = ours.encode(text)
    assert ours.decode(ids) == library.decode(ids) == text
    stream = ours.stream()
    streamed = "".join([*(stream.push([token]) for token in ids), stream.flush()])
    assert streamed.removeprefix(" ") == text


LLAMA, _ = make(llama())


@given(st.lists(st.integers(3, LLAMA.vocab_size - 1)))
def test_a_stream_of_byte_tokens_ends_at_characters(ids: list[int]) -> None:
    """Silent failure: a run of byte tokens makes one broken character of several whole ones."""
    stream = LLAMA.stream()
    pieces = [stream.push([token]) for token in ids]
    whole = b"".join(LLAMA.token_bytes(token) for token in ids).decode("utf-8", "replace")
    assert "".join(pieces) + stream.flush() == whole
    assert LLAMA.decode(ids) == whole.removeprefix(" ")


def test_a_continuation_keeps_its_space() -> None:
    """Silent failure: text after a prompt loses the space that its first token brings."""
    ids = LLAMA.encode("a b")
    assert LLAMA.stream().push(ids[-1:]) == " b"
    assert LLAMA.decode(ids[-1:]) == "b"


def test_bytes_of_each_kind_of_token() -> None:
    assert LLAMA.token_bytes(3 + 0x0A) == b"\n" and LLAMA.token_bytes(3 + 0xE2) == b"\xe2"
    assert LLAMA.token_bytes(LLAMA.encode("a")[0]) == b" a"
    assert LLAMA.token_bytes(1) == b"<s>" and LLAMA.token_text(1) == "<s>"
    ours, _ = make(byte_level())
    assert [ours.token_bytes(token) for token in ours.encode("\xe9\n")] == [b"\xc3", b"\xa9", b"\n"]
    assert ours.token_bytes(257) == b"<|end|>" and ours.token_bytes(258) == b"<think>"
    assert ours.token_text(ours.encode("\xe9")[0]) == "\ufffd"


def test_an_added_token_outside_the_alphabet_is_its_own_text() -> None:
    content = byte_level(added_tokens=[added(257, "\u65e5 x")])
    ours, library = make(content)
    assert ours.token_bytes(257) == "\u65e5 x".encode()
    whole = library.decode([257], skip_special_tokens=False)
    assert ours.decode([257], skip_special=False) == whole and ours.decode([257]) == ""


def test_a_piece_never_ends_inside_a_character() -> None:
    """Silent failure: a token's characters are shown before the token is whole."""
    stream = TextStream([b"a\xe2", b"\x82\xac"].__getitem__)
    assert [stream.push([0]), stream.push([1]), stream.push([0]), stream.flush()] == [
        "", "a\u20ac", "", "a\ufffd",
    ]  # fmt: skip


def test_a_hole_is_known_and_no_token(tmp_path: Path) -> None:
    """Silent failure: ids above a hole are encoded and cannot be decoded."""
    ours = load(tmp_path, byte_level())
    assert ours.vocab_size == 300 and ours.missing_ids == {256, *range(259, 299)}
    ids = ours.encode("x<think>zzy")
    assert {258, 299} < set(ids) and ours.decode(ids) == "x<think>zzy"
    for read in (ours.token_bytes, ours.token_text, lambda token: ours.decode([token])):
        with pytest.raises(ValueError, match="outside the vocabulary; ids are 0 to 299 but for 41"):
            read(256)
    assert not LLAMA.missing_ids


@pytest.mark.parametrize(
    ("content", "config", "adds"),
    [
        (llama(), {"bos_token": "<s>"}, True),
        (llama(), {"bos_token": "<s>", "add_bos_token": False}, True),
        (llama() | {"post_processor": None}, {"bos_token": "<s>", "add_bos_token": False}, False),
        (llama() | {"post_processor": None}, {"bos_token": "<s>", "add_bos_token": True}, True),
        (byte_level(), {"bos_token": "<|end|>"}, False),
        (byte_level(), {"bos_token": "<|end|>", "add_bos_token": True}, False),
        (byte_level(), {"bos_token": None, "add_bos_token": True}, False),
    ],
)
def test_a_prompt_begins_with_bos_where_the_files_say_so(
    content: dict[str, Any],
    config: dict[str, Any],
    adds: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Silent failure: a model reads a token at the start of each prompt that it never saw there.
    As in transformers 5, a post-processor counts, and one that contradicts is named.
    """
    ours = load(tmp_path, content, config)
    contradicts = config["bos_token"] and config.get("add_bos_token", adds) != adds
    assert len(caplog.messages) == bool(contradicts)
    plain = ours.encode("a b")
    assert ours.adds_bos is adds
    assert ours.encode_prompt("a b") == ([ours.bos_id, *plain] if adds else plain)
    ours.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").adds_bos is adds
    asked = ours.with_roles({}, adds_bos=True)
    asked.save(tmp_path / "asked")
    again = load_tokenizer(tmp_path / "asked")
    assert again.adds_bos is asked.adds_bos is (asked.bos_id is not None)
    assert again.fingerprint == asked.fingerprint


def test_added_tokens_that_a_model_lacks_are_text(tmp_path: Path) -> None:
    """Guards fine-tunes whose tokenizer has a [PAD] that the embeddings lack: they were refused,
    and as tokens their ids would be read behind the embeddings.
    """
    content = llama()
    size = len(content["model"]["vocab"])
    content["added_tokens"].append(added(size, "[PAD]", special=False))
    ours = load(tmp_path, content, {"pad_token": "[PAD]", "eos_token": "</s>"})
    assert size in ours.encode("a[PAD]") and ours.pad_id == size
    within = ours.within(size)
    assert within.vocab_size == size and within.decode(within.encode("a[PAD]b")) == "a[PAD]b"
    assert within.pad_id is None and within.eos_id == 2
    assert ours.within(size + 1) is ours
    assert ours.within(size - 1).vocab_size == size  # a token of its own, not an added one


def test_truncation_and_padding_of_the_file_are_not_for_prompts(tmp_path: Path) -> None:
    """Silent failure: a prompt loses its end, or gets four billion fillers."""
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 1 << 33}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    ours = load(tmp_path, byte_level(truncation=truncation, padding=padding))
    assert len(ours.encode("abcdef")) == 6 and len(ours.encode_batch(["abcdef", "a"])[1]) == 1
    assert len(ours.encode("abc<|end|>", allow_special=True)) == 4


@pytest.mark.parametrize("kind", ["CTC", "BPEDecoder"])
def test_other_decoders_are_refused(kind: str, tmp_path: Path) -> None:
    decoder = {
        "CTC": {"type": "CTC", "pad_token": "!", "word_delimiter_token": "|", "cleanup": True},
        "BPEDecoder": {"type": "BPEDecoder", "suffix": "</w>"},
    }[kind]
    with pytest.raises(ValueError, match=f"a decoder with {kind} is not supported"):
        load(tmp_path, byte_level(decoder=decoder))


def test_a_text_that_would_lose_a_character_is_refused() -> None:
    """Guards prompts and training text that silently lose what the vocabulary has no token for."""
    content = byte_level()
    del content["model"]["vocab"]["b"]
    content["model"]["merges"] = []
    content["model"]["vocab"] = {t: n for t, n in content["model"]["vocab"].items() if "b" not in t}
    tokenizer, _ = make(content)
    assert tokenizer.decode(tokenizer.encode("a c")) == "a c"
    with pytest.raises(ValueError, match=r"^tokenizer: has no token for 'b' and no unknown token"):
        tokenizer.encode("a b")
    with pytest.raises(ValueError, match="has no token for 'b'"):
        tokenizer.encode_batch(["a", "b"])
    lowered, _ = make(content | {"normalizer": {"type": "Lowercase"}})
    with pytest.raises(ValueError, match="has no token for 'b'"):
        lowered.encode("a B")
    content["model"]["unk_token"] = "a"
    assert make(content)[0].encode("b") == make(content)[0].encode("a")


def test_what_the_library_raises_at_a_text_is_one_line() -> None:
    content = words_alone()
    content["model"]["unk_token"] = "absent"
    with pytest.raises(ValueError, match=r"^tokenizer: its rules fail on this text \(.*UNK"):
        make(content)[0].encode("zebra")
