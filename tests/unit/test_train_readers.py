"""Files of documents: formats, columns, and what is said about bad ones."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from twotower.train.readers import is_document_file, read_file, stem_of

PAIRS = [("Say 1: ", "one\n"), ("", "two"), ("Zürich? ", "ja\u2028nein")]


def write_parquet(file: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def write_jsonl(file: Path, *records: object) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    file.write_text(text, encoding="utf-8")
    return file


def test_jsonl_has_texts_or_pairs(tmp_path: Path) -> None:
    """Silent failure: a line separator inside a string (U+2028) ends the line."""
    records = [{"prompt": p, "completion": c, "id": 1} for p, c in PAIRS]
    file = write_jsonl(tmp_path / "d.jsonl", *records, {"text": "whole"})
    assert list(read_file(file)) == [*PAIRS, ("", "whole")]
    assert list(read_file(file, ())) == list(read_file(file))  # starts anew


def test_jsonl_skips_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert list(read_file(file)) == [("", "a"), ("", "b")]


def test_columns_can_be_named(tmp_path: Path) -> None:
    record = {"text": "t", "question": "q", "answer": "a"}
    file = write_jsonl(tmp_path / "d.jsonl", record)
    table = write_parquet(tmp_path / "d.parquet", **{name: [v] for name, v in record.items()})
    for path in (file, table):
        assert list(read_file(path)) == [("", "t")]
        assert list(read_file(path, ["answer"])) == [("", "a")]
        assert list(read_file(path, ["question", "answer"])) == [("q", "a")]


def test_parquet_of_texts_and_pairs(tmp_path: Path) -> None:
    """Silent failure: rows of a later row group or of another string type are lost."""
    texts = [f"text {i}" for i in range(2500)]
    table = pyarrow.table({"id": range(2500), "text": pyarrow.array(texts, pyarrow.large_string())})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=700)
    assert list(read_file(tmp_path / "t.parquet")) == [("", text) for text in texts]
    prompts, completions = zip(*PAIRS, strict=True)
    file = write_parquet(tmp_path / "p.parquet", prompt=prompts, completion=completions)
    assert list(read_file(file)) == PAIRS


def test_text_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("\n\nfirst\nstill first\n\n \t\n\nsecond\n  indented", encoding="utf-8")
    assert list(read_file(file)) == [("", "first\nstill first\n"), ("", "second\n  indented")]


def test_names_are_no_patterns_and_compressed_files_are_read(tmp_path: Path) -> None:
    """Silent failure: brackets are taken for a pattern and a neighbour is read instead."""
    folder = tmp_path / "a [1] #b"
    folder.mkdir()
    (tmp_path / "a 1 #b").mkdir()
    plain = write_jsonl(folder / "x*?.jsonl", {"text": "mine"})
    write_jsonl(folder / "xyz.jsonl", {"text": "other"})
    assert list(read_file(plain)) == [("", "mine")]
    with gzip.open(folder / "z.jsonl.gz", "wt") as stream:
        stream.write('{"text": "packed"}\n')
    assert list(read_file(folder / "z.jsonl.gz")) == [("", "packed")]


def test_what_names_say() -> None:
    assert [stem_of(Path(p)) for p in ("d/a.jsonl", "a.v2.jsonl.gz", "a")] == ["a", "a.v2", "a"]
    names = ["a.jsonl", "b/c.parquet", "a.txt.gz", "a.bin", "README", ".a.txt", ".git/a.txt"]
    assert [is_document_file(Path(name)) for name in names] == [True] * 3 + [False] * 4


GOOD = b'{"text": "fine"}\n'
BAD_LINES = {
    "no JSON": (b"{", "line 3 is not JSON"),
    "a list": (b"[1]", "line 3 is JSON but not an object"),
    "half a pair": (b'{"prompt": "a"}', r"line 3 has no column text, nor prompt and completion"),
    "no columns": (b"{}", "line 3 has no column .* but nothing"),
    "a number": (b'{"text": 5}', "line 3: text is int, not a string"),
    "a null": (b'{"text": null}', "line 3: text is null"),
    "a null prompt": (b'{"prompt": null, "completion": "b"}', "line 3: prompt is null"),
    "empty": (b'{"text": ""}', "line 3: text is empty"),
    "blank": (b'{"prompt": "a", "completion": " \\n"}', "line 3: completion is empty"),
    "half a character": (b'{"text": "a\\ud800"}', "line 3: text is not UTF-8 text"),
    "deep": (b"[" * 100_000, "line 3 is not JSON"),
    "another encoding": (b'{"text": "Z\xfcrich"}', "line 3 is not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_jsonl_names_the_line(tmp_path: Path, kind: str) -> None:
    line, words = BAD_LINES[kind]
    file = tmp_path / "d.jsonl"
    file.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=f"d.jsonl {words}") as caught:
        list(read_file(file))
    assert "\n" not in str(caught.value)


def test_the_line_is_counted_over_many_chunks(tmp_path: Path) -> None:
    """Silent failure: the line is counted from the start of a batch, not of the file."""
    file = tmp_path / "d.jsonl"
    file.write_bytes(GOOD * 4321 + b"?\n")
    with pytest.raises(ValueError, match="line 4322 is not JSON"):
        list(read_file(file))


def test_bad_parquet_names_the_row_or_column(tmp_path: Path) -> None:
    values = ["fine"] * 2000
    file = write_parquet(tmp_path / "d.parquet", text=[*values, None, "fine"])
    with pytest.raises(ValueError, match=r"d.parquet row 2001: text is null"):
        list(read_file(file))
    write_parquet(file, text=[*values, " "])
    with pytest.raises(ValueError, match=r"d.parquet row 2001: text is empty"):
        list(read_file(file))
    write_parquet(file, text=[3, 4])
    with pytest.raises(ValueError, match=r"d.parquet row 1: text is int, not a string"):
        list(read_file(file))
    write_parquet(file, body=["a"], title=["b"])
    with pytest.raises(ValueError, match=r"d.parquet has no column .* but body, title; name yours"):
        list(read_file(file))
    with pytest.raises(ValueError, match="has no column body and x but body, title"):
        list(read_file(file, ["body", "x"]))


def _cut(content: bytes) -> bytes:
    return content[:-30]


def _overwrite(content: bytes) -> bytes:
    return content[:10] + bytes(60) + content[70:]


@pytest.mark.parametrize("harm", [_cut, _overwrite, lambda _: b"no parquet at all"])
def test_a_damaged_parquet_file_is_one_line(
    tmp_path: Path, harm: Callable[[bytes], bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: a cut file is skipped, or libraries add lines of their own."""
    file = write_parquet(tmp_path / "d.parquet", text=[f"some text {i * i}" for i in range(100)])
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(
        ValueError, match=r"d.parquet cannot be read, it is cut or damaged"
    ) as caught:
        list(read_file(file))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_cut_compressed_file_is_refused(tmp_path: Path) -> None:
    """Silent failure: the rest of a corpus is missing."""
    packed = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(5000)))
    (tmp_path / "d.jsonl.gz").write_bytes(packed[:-2000])
    with pytest.raises(ValueError, match=r"d.jsonl.gz cannot be read, it is cut or damaged"):
        list(read_file(tmp_path / "d.jsonl.gz"))


def test_files_without_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("\n \n")
    (tmp_path / "d.jsonl").write_text("\n\n")
    write_parquet(tmp_path / "d.parquet", text=pyarrow.array([], pyarrow.string()))
    for name in ("d.txt", "d.jsonl", "d.parquet"):
        with pytest.raises(ValueError, match=f"{name} holds no documents"):
            list(read_file(tmp_path / name))


def test_binary_files_are_no_text(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "d.dat", text=["a"] * 50)
    with pytest.raises(ValueError, match=r"d.dat line \d+ is not UTF-8 text"):
        list(read_file(file))


def test_no_network_and_nothing_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: a library fills somebody's cache folder, or reports each use to a server."""
    code = (
        "import socket, sys, pathlib\n"
        "def refuse(*args): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from twotower.train.readers import read_file\n"
        "for name in sys.argv[1:]: print(sum(1 for _ in read_file(pathlib.Path(name))))\n"
    )
    files = [
        write_jsonl(tmp_path / "d.jsonl", {"text": "a"}, {"text": "b"}),
        write_parquet(tmp_path / "d.parquet", text=["a"] * 3),
    ]
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(temporary))
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("2\n3\n", "", 0)
    assert list(home.rglob("*")) == list(temporary.rglob("*")) == []


def test_without_pyarrow_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "d.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[data\]"'):
        list(read_file(file))
    assert list(read_file(write_jsonl(tmp_path / "d.jsonl", {"text": "a"}))) == [("", "a")]


PACKERS = {"gz": gzip.compress, "BZ2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", ["X.JSONL", "x.Json", "x.NDJSON"])
def test_names_in_capitals_are_read_by_their_kind(tmp_path: Path, name: str, packing: str) -> None:
    """Silent failure: `x.JSONL` is trained on as raw text, braces and all."""
    content = b'{"text": "mine"}\n'
    (tmp_path / name).write_bytes(content)
    packed = tmp_path / f"{name}.{packing}"
    packed.write_bytes(PACKERS[packing](content))
    for file in (tmp_path / name, packed):
        assert list(read_file(file)) == [("", "mine")]
        assert is_document_file(Path(file.name)) and stem_of(file) == Path(name).stem
    text = tmp_path / f"Y.TXT.{packing}"
    text.write_bytes(PACKERS[packing](b"one\n\ntwo"))
    assert list(read_file(text)) == [("", "one\n"), ("", "two")]
    table = write_parquet(tmp_path / "T.PARQUET", text=["a"])
    assert list(read_file(table)) == [("", "a")]


@pytest.mark.parametrize(
    ("name", "words"),
    [("d.CSV", "is a .csv file, which is not read"), ("d.jsonl.zst", "is a .zst file"),
     ("d.log", "holds JSON objects but is not named .jsonl"), ("d", "holds JSON objects")],
)  # fmt: skip
def test_columns_are_never_trained_on_as_raw_text(tmp_path: Path, name: str, words: str) -> None:
    """Silent failure: commas, quotes and field names become most of what a model learns."""
    (tmp_path / name).write_bytes(b'\n{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=words) as caught:
        list(read_file(tmp_path / name))
    assert "\n" not in str(caught.value)
    (tmp_path / "said.txt").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "code").write_bytes(b"{\n  int x;\n}\n")
    assert list(read_file(tmp_path / "said.txt")) == [("", '{"text": "a"}\n')]
    assert list(read_file(tmp_path / "code")) == [("", "{\n  int x;\n}\n")]


def test_a_file_that_must_not_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = write_jsonl(tmp_path / "d.jsonl", {"text": "a"})
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"d.jsonl cannot be opened \(Permission denied\)"):
        list(read_file(file))
