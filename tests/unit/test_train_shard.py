"""Token shards on disk: what is written is read, damage is refused."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tiny_training import make_shard, set_meta
from twotower.train.shard import Shard, ShardWriter, choose_dtype


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    return make_shard(tmp_path / "shard")


def test_documents_and_their_marks_are_written_one_after_the_other(tmp_path: Path) -> None:
    with closing(ShardWriter(tmp_path, "uint16")) as writer:
        writer.append([1, 5, 6, 2], begin=0, context=3)
        writer.append([2, 1, 2], begin=1, context=2)
        writer.append([7, 2], begin=0, context=0)
    assert np.fromfile(tmp_path / "tokens.bin", "<u2").tolist() == [1, 5, 6, 2, 2, 1, 2, 7, 2]
    assert np.fromfile(tmp_path / "marks.bin", "u1").tolist() == [2, 0, 0, 1, 0, 2, 1, 3, 1]
    assert (writer.num_tokens, writer.num_documents) == (9, 3)


def test_marks_are_completions_and_beginnings(shard_folder: Path) -> None:
    shard = Shard(shard_folder)
    begins = shard.beginnings(slice(None)).tolist()
    assert begins == np.flatnonzero(shard.tokens[:] == 1).tolist() and len(begins) == 400
    inside = slice(begins[7] - 3, begins[8] + 3)
    assert shard.beginnings(inside).tolist() == [3, begins[8] - begins[7] + 3]
    assert shard.is_completion(inside)[:3].all() and not shard.is_completion(inside)[3]


def _cut(folder: Path) -> None:
    file = folder / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-2])


def _flip(name: str, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[100] ^= 1
    (folder / name).write_bytes(bytes(content))


def _set_special(folder: Path, **changes: object) -> None:
    special = json.loads((folder / "meta.json").read_text())["special"]
    set_meta(folder, special=special | changes)


DAMAGE = {
    "no meta": (lambda f: (f / "meta.json").unlink(), "not a token shard"),
    "broken meta": (lambda f: (f / "meta.json").write_text("{"), "damaged"),
    "deep meta": (lambda f: (f / "meta.json").write_text("[" * 100_000), "damaged"),
    "meta of nothing": (lambda f: (f / "meta.json").write_text("{}"), "format None"),
    "meta that is a list": (lambda f: (f / "meta.json").write_text("[]"), "damaged"),
    "meta with an odd field": (lambda f: set_meta(f, colour="red"), "damaged"),
    "later format": (lambda f: set_meta(f, format=9), "format 9"),
    "older format": (lambda f: set_meta(f, format=3), "reads format 5 .* prepare the data again"),
    "no eos": (lambda f: _set_special(f, eos=[]), "names no eos token"),
    "a bos past the vocabulary": (lambda f: _set_special(f, bos=999), "token 999 is outside"),
    "an eos in words": (lambda f: _set_special(f, eos="2"), "'2' is not a whole number"),
    "alignment to nothing": (lambda f: set_meta(f, align=0), "align=0"),
    "alignment in words": (lambda f: set_meta(f, align="8"), "align is '8', not a whole number"),
    "a size that is no number": (lambda f: set_meta(f, vocab_size=None), "vocab_size is None"),
    "a negative length": (lambda f: set_meta(f, num_tokens=-1), "num_tokens is -1"),
    "another length": (lambda f: set_meta(f, num_tokens=7), "where meta.json promises 14"),
    "a checksum of nothing": (lambda f: set_meta(f, tokens_sha256=None), "tokens_sha256 is None"),
    "other dtype": (lambda f: set_meta(f, dtype="int8"), "int8"),
    "tokens are missing": (lambda f: (f / "tokens.bin").unlink(), "tokens.bin is missing"),
    "marks are missing": (lambda f: (f / "marks.bin").unlink(), "marks.bin is missing"),
    "empty tokens": (lambda f: (f / "tokens.bin").write_bytes(b""), "missing or empty"),
    "cut tokens": (_cut, r"tokens.bin has \d+ bytes where meta.json promises \d+"),
    "corrupt tokens": (lambda f: _flip("tokens.bin", f), "tokens.bin does not match its checksum"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no file"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "is not JSON"),
    "another tokenizer": (lambda f: set_meta(f, tokenizer_sha256="0" * 64), "another tokenizer"),
    "corrupt marks": (lambda f: _flip("marks.bin", f), "marks.bin does not match its checksum"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shards_are_one_clear_line(shard_folder: Path, kind: str) -> None:
    """Silent failure: training on garbage, or a traceback out of numpy."""
    harm, words = DAMAGE[kind]
    Shard(shard_folder)
    harm(shard_folder)
    with pytest.raises(ValueError, match=words) as caught:
        Shard(shard_folder)
    assert "\n" not in str(caught.value)


def test_wide_vocabularies_get_wide_tokens() -> None:
    assert [choose_dtype(size) for size in (270, 65536, 65537)] == ["uint16", "uint16", "uint32"]
