"""What a token shard is on disk: its memory-mapped view, and how it is written.

A shard is a folder: `tokens.bin` (one stream of little-endian uint16 or uint32), `marks.bin` (uint8
for each token: 1 where it belongs to a completion or is the EOS behind it, plus 2 where a document
begins), `meta.json` (what it is, with checksums) and the tokenizer's files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from twotower.tokenizer import load_tokenizer

META_FILE = "meta.json"
FORMAT = 5
_TOKENS_FILE, _MARKS_FILE = "tokens.bin", "marks.bin"
_COMPLETION, _BEGINNING = 1, 2  # marks, which add up
_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
_BYTE: np.dtype[np.unsignedinteger] = np.dtype(np.uint8)
_Record = TypeVar("_Record")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids with a role, if there is a token; the first of `eos` ends documents, all end a text."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    mask: int | None


@dataclass(frozen=True, kw_only=True)
class ShardMeta:
    """What `meta.json` says about a shard; `sources` are tokens by name."""

    vocab_size: int  # of the tokenizer
    special: SpecialTokens
    num_tokens: int
    num_documents: int
    dtype: str
    tokens_sha256: str
    marks_sha256: str
    tokenizer_sha256: str
    sources: dict[str, int]
    seed: int
    align: int = 1
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.align < 1 or self.vocab_size < 1:
            raise ValueError(f"align={self.align} and vocab_size={self.vocab_size} must be above 0")
        special = self.special
        if not special.eos:
            raise ValueError("it names no eos token")
        for token in (special.bos, *special.eos, special.pad, special.mask):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"special token {token} is outside its vocabulary")

    @property
    def mask_id(self) -> int:
        """The mask token of a new model: the tokenizer's, or the first id past its vocabulary."""
        return self.vocab_size if self.special.mask is None else self.special.mask

    @property
    def model_vocab_size(self) -> int:
        """How many ids a new model needs: the tokenizer's, and one more where it has no mask."""
        return max(self.vocab_size, self.mask_id + 1)

    def write(self, folder: Path) -> None:
        (folder / META_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


class Shard:
    """One validated, memory-mapped token stream. Opening it reads each file once, to check it."""

    def __init__(self, folder: Path | str) -> None:
        self.folder, self.meta = Path(folder), read_meta(Path(folder))
        size, dtype = self.meta.num_tokens, _DTYPES[self.meta.dtype]
        self.tokens = _map(self.folder / _TOKENS_FILE, dtype, size, self.meta.tokens_sha256)
        self._marks = _map(self.folder / _MARKS_FILE, _BYTE, size, self.meta.marks_sha256)
        self.tokenizer = load_tokenizer(self.folder)  # which the trained model will need
        if self.tokenizer.fingerprint != self.meta.tokenizer_sha256:
            raise ValueError(
                f"data: {self.folder} was made with another tokenizer than its own; prepare the "
                "data again"
            )

    def is_completion(self, span: slice) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which tokens belong to completions, with the EOS behind them."""
        return self._marks[span] & _COMPLETION > 0

    def beginnings(self, span: slice) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """Where documents begin, counted from the start of the span."""
        return np.flatnonzero(self._marks[span] & _BEGINNING)


def read_meta(folder: Path) -> ShardMeta:
    """Parse and check `meta.json`; ValueError (one line) if this is no shard of ours."""
    file = folder / META_FILE
    if not file.is_file():
        raise ValueError(
            f"data: {folder} is not a token shard (no {META_FILE}); run 'twotower prepare --output "
            f"{folder}'"
        )
    try:
        content = json.loads(file.read_text())
        found = content.get("format"), content.get("dtype")
        is_known = found[0] == FORMAT and found[1] in _DTYPES
        meta = _parse_meta(content) if is_known else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data: {file} is damaged ({reason}); prepare the data again") from error
    if meta is None:
        raise ValueError(
            f"data: {file} has format {found[0]!r} and dtype {found[1]!r}; this version reads "
            f"format {FORMAT} with {' or '.join(_DTYPES)}: prepare the data again"
        )
    return meta


def _parse_meta(content: dict[str, Any]) -> ShardMeta:
    special = content["special"] | {"eos": tuple(content["special"]["eos"])}
    for tokens in (*special["eos"], *content["sources"].values()):
        if type(tokens) is not int:
            raise ValueError(f"{tokens!r} is not a whole number")
    return _typed(ShardMeta, content | {"special": _typed(SpecialTokens, special)})


def _typed(kind: type[_Record], values: Mapping[str, Any]) -> _Record:
    """A record of plain values; ValueError for a field of another type or a negative number."""
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # all our records are
        value = values.get(field.name, field.default)
        expected = str(field.type)
        is_none = value is None and expected.endswith("None")
        if expected.startswith("int") and not is_none and (type(value) is not int or value < 0):
            raise ValueError(f"{field.name} is {value!r}, not a whole number")
        if expected == "str" and type(value) is not str:
            raise ValueError(f"{field.name} is {value!r}, not text")
    return kind(**values)


def _map(
    file: Path, dtype: np.dtype[np.unsignedinteger], num_tokens: int, sha256: str
) -> np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]:
    size = file.stat().st_size if file.is_file() else 0
    if size == 0:
        raise ValueError(f"data: {file} is missing or empty; prepare the data again")
    if size != num_tokens * dtype.itemsize:
        raise ValueError(
            f"data: {file} has {size} bytes where {META_FILE} promises "
            f"{num_tokens * dtype.itemsize}; "
            "the file is cut or mixed up: prepare the data again"
        )
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"data: {file} does not match its checksum, it is corrupt; prepare the data again"
        )
    return np.memmap(file, dtype=dtype, mode="r", shape=(num_tokens,))


def choose_dtype(vocab_size: int) -> str:
    """The narrowest token type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Appends documents to a shard's files, counting on the way; `close` it at the end."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.num_tokens = 0
        self.num_documents = 0
        self._dtype = _DTYPES[dtype]
        self._files = [(folder / name).open("wb") for name in (_TOKENS_FILE, _MARKS_FILE)]
        self._hashes = hashlib.sha256(), hashlib.sha256()

    def append(self, ids: list[int], begin: int, context: int) -> None:
        """Write a document that begins at its token number `begin`, after what fills up a block;
        its first `context` tokens stand before its completion.
        """
        tokens, marks = np.asarray(ids, dtype=self._dtype), np.zeros(len(ids), dtype=_BYTE)
        marks[context:] = _COMPLETION
        marks[begin] += _BEGINNING
        for file, checksum, values in zip(self._files, self._hashes, (tokens, marks), strict=True):
            file.write(values.tobytes())
            checksum.update(values.tobytes())
        self.num_tokens += len(ids)
        self.num_documents += 1

    def checksums(self) -> tuple[str, str]:
        """Of the tokens and of the marks so far."""
        tokens, marks = (checksum.hexdigest() for checksum in self._hashes)
        return tokens, marks

    def close(self) -> None:
        for file in self._files:
            file.close()
