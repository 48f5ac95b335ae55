"""One file of documents -> (prompt, completion) pairs, as a stream.

Decides by the file's name how it is read (capitals are no difference), which columns hold the text,
and that an error names the file and the line or row. No file is ever whole in memory; one document
is.
"""

import bz2
import gzip
import itertools
import json
import lzma
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from twotower.arguments import require_unicode

Text = tuple[str, str]  # prompt, completion; the prompt may be empty

_JSON = {".jsonl", ".ndjson", ".jsonlines", ".json"}
_PARQUET = {".parquet", ".pq"}
_PLAIN = {".txt", ".text", ".md"}
_OPENERS: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Their columns, or packed bytes, would be trained on as they stand.
_NOT_READ = {".csv", ".tsv", ".zst", ".zip", ".lz4"}
_ROWS = 1000  # of a Parquet file, read at a time
_DEFAULT_COLUMNS = (("text",), ("prompt", "completion"))


def stem_of(file: Path) -> str:
    """A file's name without what says how it is stored: "a" for a.jsonl.gz."""
    inner = file.with_suffix("") if file.suffix.lower() in _OPENERS else file
    return inner.stem


def suffix_of(file: Path) -> str:
    """The suffix that says how a file is read, in small letters: ".jsonl" for a.JSONL.gz."""
    packed = file.suffix.lower() in _OPENERS
    return (Path(file.stem).suffix if packed else file.suffix).lower()


def is_document_file(file: Path) -> bool:
    """Whether a folder that is read whole has this file read: by its name, hidden ones left out."""
    is_hidden = any(part.startswith(".") for part in file.parts if part not in (".", ".."))
    return not is_hidden and suffix_of(file) in _JSON | _PARQUET | _PLAIN


def has_columns(file: Path) -> bool:
    """Whether a file's documents have named columns."""
    return suffix_of(file) in _JSON | _PARQUET


def read_file(file: Path, columns: Sequence[str] = ()) -> Iterator[Text]:
    """Every document of a file in its order; a name without a known suffix is plain text.

    `columns` names one column of text, or those of prompt and completion; without, "text" or
    "prompt" and "completion". ValueError (one line) for whatever is wrong with the file.
    """
    suffix, is_empty = suffix_of(file), True
    if suffix in _NOT_READ:
        raise ValueError(
            f"input: {file} is a {suffix} file, which is not read; convert it to .jsonl, .parquet "
            "or .txt (.gz, .bz2 and .xz are unpacked)"
        )
    if suffix in _JSON:
        texts = _read_json(file, columns)
    elif suffix in _PARQUET:
        texts = _read_parquet(file, columns)
    else:
        texts = _read_plain(file, is_named_text=suffix in _PLAIN)
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
    with _damage_named(file), _open_parquet(file) as table:
        available = table.schema_arrow.names
    names = _choose(available, columns, f"input: {file}")
    for number, values in enumerate(_parquet_rows(file, names), 1):
        yield _document(values, names, f"input: {file} row {number}")


def _parquet_rows(file: Path, names: Sequence[str]) -> Iterator[tuple[object, ...]]:
    with _damage_named(file), _open_parquet(file) as table:
        for batch in table.iter_batches(_ROWS, columns=list(names)):
            yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def _open_parquet(file: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError('pyarrow is not installed: pip install ".[data]"') from None
    return ParquetFile(file)


def _read_plain(file: Path, is_named_text: bool) -> Iterator[Text]:
    """Documents are separated by blank lines."""
    is_first = True
    for is_blank, group in itertools.groupby(_lines(file), lambda line: not line.strip()):
        if not is_blank:
            text = "".join(group)
            if is_first and not is_named_text:
                _refuse_json(file, text)
            is_first = False
            require_unicode(text, f"input: {file}")
            yield "", text


def _refuse_json(file: Path, text: str) -> None:
    """JSONL under another name would be trained on with its braces."""
    line = text.partition("\n")[0].strip()
    try:
        is_object = line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        is_object = False
    if is_object:
        raise ValueError(
            f"input: {file} holds JSON objects but is not named .jsonl; rename it, or name it .txt "
            "to train on the JSON itself"
        )


def _choose(available: Collection[str], columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The names of the columns to read: one of text, or prompt and completion."""
    for names in (tuple(columns),) if columns else _DEFAULT_COLUMNS:
        if set(names) <= set(available):
            return names
    wanted = " and ".join(columns) if columns else "text, nor prompt and completion"
    found = ", ".join(sorted(available)) or "nothing"
    raise ValueError(
        f"input: {where} has no column {wanted} but {found}; name yours with columns=..."
    )


def _document(values: Sequence[object], names: Sequence[str], where: str) -> Text:
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise ValueError(f"{where}: {name} is {kind}, not a string; correct or remove it")
        require_unicode(value, f"{where}: {name}")
    *prompt, completion = map(str, values)
    if not completion.strip():
        raise ValueError(f"{where}: {names[-1]} is empty; correct or remove it")
    return "".join(prompt), completion


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file with their ends, without a byte order mark."""
    opened = _OPENERS.get(file.suffix.lower(), open)
    with _damage_named(file), opened(file, "rt", encoding="utf-8-sig") as stream:
        yield from stream


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Turn what the libraries below raise for a damaged file into one line that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        is_packed = file.suffix.lower() in _OPENERS
        where = "" if is_packed else f" line {_undecodable_line(file)}"
        raise ValueError(
            f"input: {file}{where} is not UTF-8 text; convert the file, or name it .parquet if "
            "that is what it holds"
        ) from error
    except PermissionError as error:
        raise ValueError(f"input: {file} cannot be opened ({error.strerror})") from error
    except ImportError:
        raise
    except Exception as error:  # zlib, lzma and pyarrow each raise their own kinds here
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"input: {file} cannot be read, it is cut or damaged ({reason}); get it again"
        ) from error


def _undecodable_line(file: Path) -> int:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0
