"""Token shards on disk: parts that read as one stream, damage."""

import dataclasses
import itertools
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_training import make_shard, set_meta
from twotower.train.data import Rows
from twotower.train.prepare import PrepareOptions, prepare
from twotower.train.shard import Shard, ShardWriter, TokenStream, choose_dtype


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    return make_shard(tmp_path / "shard")


def in_parts(folder: Path, part_tokens: int) -> Path:
    """The documents of `make_shard` again, beside it, in files of `part_tokens`."""
    out = folder.with_name(f"parts of {part_tokens}")
    source = folder.with_name("documents.jsonl")
    options = PrepareOptions(out=out, input=(source,), tokenizer=folder, part_tokens=part_tokens)
    for _ in prepare(options):
        pass
    return out


def test_a_stream_reads_across_its_parts() -> None:
    """Silent failure: a row that lies on the border of two files is cut short or mixed up."""
    whole = np.arange(20, dtype=np.uint16)
    for cuts in ([20], [7, 13], [1, 1, 1, 17], [5, 5, 5, 5]):
        ends = [0, *itertools.accumulate(cuts)]
        stream = TokenStream([whole[a:b] for a, b in itertools.pairwise(ends)])
        assert len(stream) == 20
        for start, stop in itertools.combinations_with_replacement(range(22), 2):
            assert stream[start:stop].tolist() == whole[start:stop].tolist()
        assert stream[:].tolist() == whole.tolist()
        assert stream[3:4].dtype == np.uint16


def test_the_writer_cuts_files_at_the_limit(tmp_path: Path) -> None:
    with closing(ShardWriter(tmp_path, "uint16", part_tokens=4)) as writer:
        writer.append([1, 5, 6, 7, 8, 9, 10, 11, 2], begin=0, context=3)
        writer.append([2, 1, 2], begin=1, context=2)
    parts = writer.parts()
    assert [part.num_tokens for part in parts] == [4, 4, 4]
    read = [np.fromfile(tmp_path / p.tokens_file, "<u2").tolist() for p in parts]
    assert read == [[1, 5, 6, 7], [8, 9, 10, 11], [2, 2, 1, 2]]
    marks = [np.fromfile(tmp_path / p.marks_file, "u1").tolist() for p in parts]
    assert marks == [[2, 0, 0, 1], [1, 1, 1, 1], [1, 0, 2, 1]]
    assert (writer.num_tokens, writer.num_documents) == (12, 2)


@pytest.mark.parametrize("part_tokens", [7, 100, 1000])
def test_rows_do_not_depend_on_how_a_shard_is_cut(shard_folder: Path, part_tokens: int) -> None:
    """Silent failure: a large corpus is read in another order, or without the rows on borders."""
    one, many = Shard(shard_folder), Shard(in_parts(shard_folder, part_tokens))
    assert len(one.meta.parts) == 1
    assert len(many.meta.parts) == -(-one.meta.num_tokens // part_tokens) > 1
    first, second = Rows(one, 32, seed=5), Rows(many, 32, seed=5)
    for a, b in [
        (first.training(0, 300), second.training(0, 300)),
        (first.held_out(0, 9), second.held_out(0, 9)),
    ]:
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.is_completion, b.is_completion)


def test_a_change_in_any_part_changes_the_checksum(shard_folder: Path) -> None:
    """Silent failure: a run is resumed on other data, because only the first part was compared."""
    meta = Shard(in_parts(shard_folder, 1000)).meta
    seen = {meta.tokens_sha256}
    for at, part in enumerate(meta.parts):
        other = dataclasses.replace(part, tokens_sha256="0" * 64)
        parts = (*meta.parts[:at], other, *meta.parts[at + 1 :])
        seen.add(dataclasses.replace(meta, parts=parts).tokens_sha256)
    assert len(seen) == 1 + len(meta.parts) == 7


def _cut(folder: Path) -> None:
    file = folder / "tokens-00001.bin"
    file.write_bytes(file.read_bytes()[:-2])


def _flip(name: str, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[100] ^= 1
    (folder / name).write_bytes(bytes(content))


def _forget_part(folder: Path) -> None:
    set_meta(folder, parts=json.loads((folder / "meta.json").read_text())["parts"][:-1])


def _set_special(folder: Path, **changes: object) -> None:
    special = json.loads((folder / "meta.json").read_text())["special"]
    set_meta(folder, special=special | changes)


def _set_part(folder: Path, **changes: object) -> None:
    first, *rest = json.loads((folder / "meta.json").read_text())["parts"]
    set_meta(folder, parts=[first | changes, *rest])


DAMAGE = {
    "no meta": (lambda f: (f / "meta.json").unlink(), "not a token shard"),
    "broken meta": (lambda f: (f / "meta.json").write_text("{"), "damaged"),
    "meta of nothing": (lambda f: (f / "meta.json").write_text("{}"), "format None"),
    "meta that is a list": (lambda f: (f / "meta.json").write_text("[]"), "damaged"),
    "meta without parts": (lambda f: set_meta(f, parts=[]), "damaged"),
    "meta with odd parts": (lambda f: set_meta(f, parts=[{"name": 1}]), "damaged"),
    "meta with an odd field": (lambda f: set_meta(f, colour="red"), "damaged"),
    "meta that forgets a part": (_forget_part, "its parts hold 5000 tokens, not 5200"),
    "later format": (lambda f: set_meta(f, format=9), "format 9"),
    "older format": (lambda f: set_meta(f, format=3), "reads format 5 .* prepare the data again"),
    "no eos": (lambda f: _set_special(f, eos=[]), "names no eos token"),
    "a bos past the vocabulary": (lambda f: _set_special(f, bos=999), "token 999 is outside"),
    "an eos in words": (lambda f: _set_special(f, eos="2"), "'2' is not a whole number"),
    "alignment to nothing": (lambda f: set_meta(f, align=0), "align=0"),
    "alignment in words": (lambda f: set_meta(f, align="8"), "align is '8', not a whole number"),
    "a size that is no number": (lambda f: set_meta(f, vocab_size=None), "vocab_size is None"),
    "a file elsewhere": (lambda f: _set_part(f, tokens_file="../x"), "'../x' is not a file name"),
    "a negative part": (lambda f: _set_part(f, num_tokens=-1), "num_tokens is -1"),
    "other dtype": (lambda f: set_meta(f, dtype="int8"), "int8"),
    "a part is missing": (lambda f: (f / "tokens-00001.bin").unlink(), "00001.bin is missing"),
    "marks are missing": (lambda f: (f / "marks-00002.bin").unlink(), "00002.bin is missing"),
    "empty part": (lambda f: (f / "tokens-00000.bin").write_bytes(b""), "missing or empty"),
    "cut part": (_cut, r"tokens-00001.bin has 1998 bytes where meta.json promises 2000"),
    "corrupt tokens": (lambda f: _flip("tokens-00001.bin", f), "00001.bin does not match its"),
    "corrupt marks": (lambda f: _flip("marks-00001.bin", f), "marks-00001.bin does"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shards_are_one_clear_line(shard_folder: Path, kind: str) -> None:
    """Silent failure: training on garbage, or a traceback out of numpy."""
    harm, words = DAMAGE[kind]
    folder = in_parts(shard_folder, 1000)
    assert len(Shard(folder).meta.parts) == 6
    harm(folder)
    with pytest.raises(ValueError, match=words) as caught:
        Shard(folder)
    assert "\n" not in str(caught.value)


def test_wide_vocabularies_get_wide_tokens() -> None:
    assert [choose_dtype(size) for size in (270, 65536, 65537)] == ["uint16", "uint16", "uint32"]
