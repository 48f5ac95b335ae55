"""tokenizer.json files that lie, hang or abort: one line each, before the library sees them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tiny_tokenizers import BYTE_LEVEL, added, byte_level, llama, unigram, word_pieces
from twotower.tokenizer import file as module
from twotower.tokenizer import load_tokenizer
from twotower.tokenizer.patterns import why_refused


def nested(part: dict[str, Any], members: str, depth: int) -> dict[str, Any]:
    for _ in range(depth):
        part = {"type": "Sequence", members: [part]}
    return part


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def sequence(members: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", members: list(steps)}


def with_model(content: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**content, "model": {**content["model"], **values}}


def charsmap(data: bytes) -> dict[str, Any]:
    import base64

    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def around(pieces: int, ids: int) -> dict[str, Any]:
    token = {"id": "x", "ids": [1] * ids, "tokens": ["x"] * ids}
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * pieces,
        "pair": [],
        "special_tokens": {"x": token},
    }
    return byte_level(post_processor=processor)


NFC = {"type": "NFC"}
VOCAB = byte_level()["model"]["vocab"]
BAD = {
    "normalizers nested": (
        byte_level(normalizer=nested(NFC, "normalizers", 50)),
        "nested",
    ),
    "decoders nested": (byte_level(decoder=nested(BYTE_LEVEL, "decoders", 9)), "nested"),
    "many steps": (
        byte_level(normalizer=sequence("normalizers", *[NFC] * 70)),
        "steps",
    ),
    "growing": (
        byte_level(normalizer=sequence("normalizers", *[replace("a", "a" * 9)] * 3)),
        "more than 64 times as long",
    ),
    "growing by regex": (
        byte_level(normalizer={"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y" * 99}),
        "more than 64 times as long",
    ),
    "replacing nothing": (byte_level(normalizer=replace("", "a")), "empty text"),
    "charsmap of 4 GB": (
        byte_level(normalizer=charsmap(b"\xfc\xff\xff\xff" + b"\0" * 8)),
        "damaged",
    ),
    "charsmap that grows": (
        byte_level(normalizer=charsmap(b"\4\0\0\0" + b"\0" * 4 + b"a" * 999 + b"\0")),
        "as long",
    ),
    "charsmap not base64": (
        byte_level(normalizer={"type": "Precompiled", "precompiled_charsmap": "?"}),
        "base64",
    ),
    "a slow pattern": (byte_level(pre_tokenizer=split("(a+)+c")), r"\(a\+\)\+c"),
    "a slow pattern in a list": (
        byte_level(pre_tokenizer=sequence("pretokenizers", split("a"), split("(a|aa)*c"))),
        "repeats a part",
    ),
    "a huge id": (with_model(byte_level(), vocab={**VOCAB, "zz": 4_000_000_000}), "4000000000"),
    "a negative id": (with_model(byte_level(), vocab={**VOCAB, "zz": -1}), "-1"),
    "an id that is text": (with_model(byte_level(), vocab={**VOCAB, "zz": "7"}), "7"),
    "two tokens of one id": (with_model(byte_level(), vocab={**VOCAB, "y2": 5}), "share id 5"),
    "an added token on another": (byte_level(added_tokens=[added(5, "<x>")]), "share id 5"),
    "an added id after a hole": (
        byte_level(added_tokens=[added(270, "<x>")]),
        "would be read as 257",
    ),
    "a huge added id": (byte_level(added_tokens=[added(1 << 31, "<x>")]), "2147483648"),
    "a long token": (with_model(byte_level(), vocab={**VOCAB, "y" * 5000: 256}), "5000 characters"),
    "random encoding": (with_model(byte_level(), dropout=0.5), "dropout"),
    "words without end": (with_model(word_pieces(), max_input_chars_per_word=1 << 40), "per_word"),
    "a score that is none": (with_model(unigram(), vocab=[["a", "x"]]), "cannot be read"),
    "very many tokens around a text": (around(pieces=65, ids=1), "at most 64"),
    "a token around a text that is very many": (around(pieces=1, ids=100_000), "at most 64"),
    "no vocabulary": (with_model(byte_level(), vocab=7), "no 'vocab'"),
    "a model that is a list": ({**byte_level(), "model": [1]}, "must be an object"),
    "steps that are none": (byte_level(normalizer=sequence("normalizers", *[7])), "steps"),
    "members that are none": (byte_level(normalizer={"type": "Sequence"}), "steps"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_hostile_file_is_one_line_at_once(name: str, tmp_path: Path) -> None:
    """Silent failure: a file from the hub aborts the server or keeps it busy for ever."""
    content, words = BAD[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert time.monotonic() - begin < 10
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_what_nests_deeper_than_python_reads_is_one_line(tmp_path: Path) -> None:
    for text in ("[" * 200_000, '{"model":' * 100_000):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"nested too deeply|not JSON"):
            load_tokenizer(tmp_path)


def test_a_large_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent failure: a gigabyte is parsed before anybody looks what it is."""
    file = tmp_path / "tokenizer.json"
    with file.open("wb") as stream:
        stream.truncate(1 << 30)  # no blocks on the disk
    with pytest.raises(ValueError, match="has 1024 MiB; at most 64 are read"):
        load_tokenizer(tmp_path)
    file.write_text(json.dumps(byte_level()))
    monkeypatch.setattr(module, "MAX_VALUES", 100)
    with pytest.raises(ValueError, match="more than 100 values"):
        load_tokenizer(tmp_path)


def test_a_damaged_config_beside_it_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level()))
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 7, "add_bos_token": "yes"}')
    assert load_tokenizer(tmp_path).adds_bos is False


def test_a_panic_of_the_library_is_one_line(tmp_path: Path) -> None:
    """Its panics are no Exception: nothing of ours would catch them."""
    content = byte_level(pre_tokenizer={"type": "FixedLength", "length": 0})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    for encode in (loaded.encode, lambda text: loaded.encode_batch([text])):
        with pytest.raises(ValueError, match="chunk size must be non-zero") as caught:
            encode("abc")
        assert "\n" not in str(caught.value)


# Of GPT-2, Llama 3, o200k, DeepSeek, BLOOM, and of some that group digits.
PUBLISHED = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[^(\s|[.,!?\u2026\u3002\uff0c])]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"(?=(\d{3})+(?!\d))",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
]
SLOW = [
    r"(a+)+c", r"(a|aa|a+)+$", r"(a|a)*b", r"(a?)*b", r"(?:(?:a)*)*", r"(a{1,2})+b", r"((a)+b?)+c",
    r"(?:a?){30}a{30}", r"a{1,3}*b", r"a{1,3}+b", r"a**", r"\s*\s*\s*x", r".*.*.*=x", r"(a)\1+",
    r"(?<x>a)\g<x>", r"(?x) a", r"(?~ab)", r"(?(1)a|b)", "[a-z", ")", "a" * 5000,
    r"(?:x{1,200}){1,200}", r"((?:a|b)c)+d",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_are_read(pattern: str) -> None:
    """Silent failure: a bound so narrow that real tokenizers are refused."""
    assert why_refused(pattern) == ""


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_may_take_forever_are_refused(pattern: str) -> None:
    assert why_refused(pattern)


@pytest.mark.parametrize("content", [llama(), unigram(), word_pieces(), byte_level()])
def test_usual_files_pass(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).vocab_size > 4


def test_merges_without_their_prefix_are_refused(tmp_path: Path) -> None:
    """Guards a process that the library aborts: it cuts the prefix off inside a character."""
    model = {"type": "BPE", "vocab": {"a": 0, "\u0120a": 1, "\u0120": 2}, "merges": ["a \u0120"]}
    model |= {"continuing_subword_prefix": "x"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(ValueError, match=r"the merge 'a .' lacks the prefix 'x'"):
        load_tokenizer(tmp_path)
