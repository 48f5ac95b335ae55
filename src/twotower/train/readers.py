"""One file of documents -> (prompt, completion) pairs, streamed by Hugging Face `datasets`.

Decides by its name how a file is read, which columns hold the text, and that a fault names the file
and the line or row. JSONL is streamed as lines and parsed here: the JSON reader of `datasets` turns
numbers into strings, absent columns into nulls, and does not say in which line it stopped. No file
is ever whole in memory; one document is.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import tempfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Text = tuple[str, str]  # prompt, completion; the prompt may be empty

_JSON, _PARQUET, _PLAIN = {".jsonl", ".ndjson", ".json"}, {".parquet"}, {".txt", ".text", ".md"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_ROWS = 1000  # read at a time
_DEFAULT_COLUMNS = (("text",), ("prompt", "completion"))


def stem_of(file: Path) -> str:
    """A file's name without what says how it is stored: "a" for a.jsonl.gz."""
    inner = file.with_suffix("") if file.suffix in _COMPRESSED else file
    return inner.stem


def suffix_of(file: Path) -> str:
    """The suffix that says how a file is read: ".jsonl" for a.jsonl.gz."""
    return Path(file.stem).suffix if file.suffix in _COMPRESSED else file.suffix


def is_document_file(file: Path) -> bool:
    """Whether a folder that is read whole has this file read: by its name, hidden ones left out."""
    is_hidden = any(part.startswith(".") for part in file.parts if part not in (".", ".."))
    return not is_hidden and suffix_of(file) in _JSON | _PARQUET | _PLAIN


def has_columns(file: Path) -> bool:
    return suffix_of(file) in _JSON | _PARQUET


def read_file(file: Path, columns: Sequence[str] = ()) -> Iterator[Text]:
    """Every document of a file in its order; an unknown suffix is read as plain text.

    `columns` names one column of text, or those of prompt and completion; without, "text" or
    "prompt" and "completion". ValueError (one line) for whatever is wrong with the file.
    """
    suffix, is_empty = suffix_of(file), True
    if suffix in _JSON:
        texts = _read_json(file, columns)
    elif suffix in _PARQUET:
        texts = _read_parquet(file, columns)
    else:
        texts = _read_plain(file)
    for text in texts:
        is_empty = False
        yield text
    if is_empty:
        raise ValueError(f"input: {file} holds no documents; fill it or leave it out")


def _read_json(file: Path, columns: Sequence[str]) -> Iterator[Text]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            where = f"input: {file} line {number}"
            record = _parse(line, where)
            names = _choose(record, columns, where)
            yield _document([record[name] for name in names], names, where)


def _parse(line: str, where: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); write one object a line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is JSON but not an object; write one object a line")
    return record


def _read_parquet(file: Path, columns: Sequence[str]) -> Iterator[Text]:
    with _faults(file), tempfile.TemporaryDirectory() as cache:
        features = _open_parquet(file, cache).features
    names, number = _choose(features, columns, f"input: {file}"), 0
    for batch in _parquet_batches(file, names):
        for values in zip(*(batch[name] for name in names), strict=True):
            number += 1
            yield _document(values, names, f"input: {file} row {number}")


def _read_plain(file: Path) -> Iterator[Text]:
    """Documents are separated by blank lines."""
    for is_blank, group in itertools.groupby(_lines(file), lambda line: not line.strip()):
        if not is_blank:
            text = "".join(group)
            _check_characters(text, f"input: {file}")
            yield "", text


def _choose(available: Collection[str], columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The names of the columns to read: one of text, or prompt and completion."""
    for names in (tuple(columns),) if columns else _DEFAULT_COLUMNS:
        if set(names) <= set(available):
            return names
    wanted = " and ".join(columns) if columns else "text, nor prompt and completion"
    found = ", ".join(sorted(available)) or "nothing"
    raise ValueError(f"{where} has no column {wanted} but {found}; name yours with --columns")


def _document(values: Sequence[object], names: Sequence[str], where: str) -> Text:
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise ValueError(f"{where}: {name} is {kind}, not a string; mend or remove it")
        _check_characters(value, f"{where}: {name}")
    *prompt, completion = map(str, values)
    if not completion.strip():
        raise ValueError(f"{where}: {names[-1]} is empty; mend or remove it")
    return "".join(prompt), completion


def _check_characters(text: str, where: str) -> None:
    """Half a surrogate pair, which JSON can spell, is no character: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not valid Unicode ({error}); mend or remove it") from error


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file with their ends, without a byte order mark."""
    with _faults(file), tempfile.TemporaryDirectory() as cache:
        dataset = _datasets().IterableDataset.from_text(
            _literal(file), cache_dir=cache, keep_linebreaks=True, encoding="utf-8-sig"
        )
        for batch in dataset.iter(batch_size=_ROWS):
            yield from batch["text"]


def _parquet_batches(file: Path, names: Sequence[str]) -> Iterator[dict[str, list[object]]]:
    with _faults(file), tempfile.TemporaryDirectory() as cache:
        dataset = _open_parquet(file, cache, columns=list(names), batch_size=_ROWS)
        yield from dataset.iter(batch_size=_ROWS)


def _open_parquet(file: Path, cache: str, **options: object) -> Any:
    return _datasets().IterableDataset.from_parquet(_literal(file), cache_dir=cache, **options)


def _literal(file: Path) -> str:
    """A path as `datasets` wants it, which would take brackets and stars for a pattern."""
    return glob.escape(str(file.absolute()))


@contextmanager
def _faults(file: Path) -> Iterator[None]:
    """Turn what the libraries below raise for a damaged file into our one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        where = "" if file.suffix in _COMPRESSED else f" line {_undecodable_line(file)}"
        raise ValueError(
            f"input: {file}{where} is not UTF-8 text; convert the file, or name it .parquet if "
            "that is what it holds"
        ) from error
    except (ValueError, OSError, EOFError, zlib.error) as error:  # pyarrow's errors are ValueErrors
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"input: {file} cannot be read, it is cut or damaged ({reason}); get it again"
        ) from error


def _undecodable_line(file: Path) -> int:
    with file.open("rb") as lines:
        return next((n for n, line in enumerate(lines, 1) if not _is_utf8(line)), 0)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError('datasets is not installed: pip install "twotower[data]"') from None
    # It would log, below our one line, the same error in its own words.
    logging.getLogger("datasets").setLevel(logging.CRITICAL + 1)
    return datasets
