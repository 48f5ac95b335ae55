"""What a token shard is on disk: its memory-mapped view, and how it is written.

A shard is a folder: `tokens-00000.bin`, ... (little-endian uint16 or uint32, one stream of tokens
cut into files), `marks-00000.bin`, ... (uint8, cut at the same places: 1 where a token belongs to a
completion or is the EOS behind it, plus 2 where a document begins), `meta.json` (what it is, with
checksums) and the tokenizer's files. Where the files are cut has no meaning, also inside a
document: readers see one stream.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

META_FILE = "meta.json"
FORMAT = 5
PART_TOKENS = 1 << 27  # in one file: 256 MB of uint16
TokenArray = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]
DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
BYTE: np.dtype[np.unsignedinteger] = np.dtype(np.uint8)
COMPLETION, BEGINNING = 1, 2  # marks, which add up
_Record = TypeVar("_Record")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids with a role: the first of `eos` ends documents, all of them end a generated text. None:
    the tokenizer has no such token.
    """

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    mask: int | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A pair of files of a shard: the same stretch of tokens and of marks."""

    tokens_file: str
    marks_file: str
    num_tokens: int
    tokens_sha256: str
    marks_sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardMeta:
    """What `meta.json` says about a shard; `sources` are tokens by name."""

    vocab_size: int  # of the tokenizer
    special: SpecialTokens
    num_tokens: int
    num_documents: int
    dtype: str
    parts: tuple[Part, ...]
    tokenizer_sha256: str
    sources: dict[str, int]
    seed: int
    align: int = 1
    format: int = FORMAT

    def __post_init__(self) -> None:
        held = sum(part.num_tokens for part in self.parts)
        if held != self.num_tokens or not self.parts:
            raise ValueError(f"its parts hold {held} tokens, not {self.num_tokens}")
        if self.align < 1 or self.vocab_size < 1:
            raise ValueError(f"align={self.align} and vocab_size={self.vocab_size} must be above 0")
        special = self.special
        if not special.eos:
            raise ValueError("it names no eos token")
        for token in (special.bos, *special.eos, special.pad, special.mask):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"special token {token} is outside its vocabulary")
        for part in self.parts:
            for name in (part.tokens_file, part.marks_file):
                if Path(name).name != name:
                    raise ValueError(f"{name!r} is not a file name")

    @property
    def mask_id(self) -> int:
        """The mask token of a new model: the tokenizer's, or the first id past its vocabulary."""
        return self.vocab_size if self.special.mask is None else self.special.mask

    @property
    def model_vocab_size(self) -> int:
        """How many ids a new model needs: the tokenizer's, and one more where it has no mask."""
        return max(self.vocab_size, self.mask_id + 1)

    @property
    def tokens_sha256(self) -> str:
        """Changes with any token: the checksum of one part, or that of the parts' checksums."""
        first, *more = (part.tokens_sha256 for part in self.parts)
        return hashlib.sha256("".join([first, *more]).encode()).hexdigest() if more else first

    def write(self, folder: Path) -> None:
        (folder / META_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


class TokenStream:
    """The arrays of all parts as one: `stream[a:b]` is a view, or a copy where files meet."""

    def __init__(self, parts: Sequence[TokenArray]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> TokenArray:
        start, stop, step = span.indices(len(self))
        assert step == 1
        pieces = []
        while start < stop:
            at = bisect_right(self._starts, start) - 1
            first = start - self._starts[at]
            piece = self._parts[at][first : first + stop - start]
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate([self._parts[0][:0], *pieces])


class Shard:
    """One validated, memory-mapped token stream. Opening it reads each file once, for its
    checksum.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        dtype, tokens, marks = DTYPES[self.meta.dtype], [], []
        for part in self.meta.parts:
            file, sha256 = self.folder / part.tokens_file, part.tokens_sha256
            tokens.append(_map(file, dtype, part.num_tokens, sha256))
            file, sha256 = self.folder / part.marks_file, part.marks_sha256
            marks.append(_map(file, BYTE, part.num_tokens, sha256))
        self.tokens, self._marks = TokenStream(tokens), TokenStream(marks)

    def num_rows(self, sequence_length: int) -> int:
        return len(self.tokens) // sequence_length

    def is_completion(self, span: slice) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which tokens belong to completions, with the EOS behind them."""
        return self._marks[span] & COMPLETION > 0

    def beginnings(self, span: slice) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """Where documents begin, counted from the start of the span."""
        return np.flatnonzero(self._marks[span] & BEGINNING)


def read_meta(folder: Path) -> ShardMeta:
    """Parse and check `meta.json`; ValueError (one line) for anything that is not a shard of
    ours.
    """
    file = folder / META_FILE
    if not file.is_file():
        raise ValueError(
            f"data: {folder} is not a token shard (no {META_FILE}); run 'twotower prepare --out "
            f"{folder}'"
        )
    try:
        content = json.loads(file.read_text())
        found = content.get("format"), content.get("dtype")
        is_known = found[0] == FORMAT and found[1] in DTYPES
        meta = _parse_meta(content) if is_known else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data: {file} is damaged ({reason}); prepare the data again") from error
    if meta is None:
        raise ValueError(
            f"data: {file} has format {found[0]!r} and dtype {found[1]!r}; this version reads "
            f"format {FORMAT} with {' or '.join(DTYPES)}: prepare the data again"
        )
    return meta


def _parse_meta(content: dict[str, Any]) -> ShardMeta:
    special = content["special"] | {"eos": tuple(content["special"]["eos"])}
    parts = tuple(_typed(Part, part) for part in content["parts"])
    for tokens in (*special["eos"], *content["sources"].values()):
        if type(tokens) is not int:
            raise ValueError(f"{tokens!r} is not a whole number")
    return _typed(ShardMeta, content | {"parts": parts, "special": _typed(SpecialTokens, special)})


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
) -> TokenArray:
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
    """Appends documents to the parts of a shard, counting on the way; `close` it at the end."""

    def __init__(self, folder: Path, dtype: str, part_tokens: int = PART_TOKENS) -> None:
        self.num_tokens = 0
        self.num_documents = 0
        self._folder, self._dtype, self._limit = folder, DTYPES[dtype], part_tokens
        self._files: list[tuple[_File, _File]] = []  # tokens and marks of each part

    def append(self, ids: list[int], begin: int, context: int) -> None:
        """Write a document that begins at its token number `begin`, after what fills up a block;
        its first `context` tokens stand before its completion.
        """
        tokens, marks = np.asarray(ids, dtype=self._dtype), np.zeros(len(ids), dtype=BYTE)
        marks[context:] = COMPLETION
        marks[begin] += BEGINNING
        while len(tokens):
            room = self._limit - self._files[-1][0].length if self._files else 0
            if room == 0:
                self._begin()
                room = self._limit
            for file, values in zip(self._files[-1], (tokens, marks), strict=True):
                file.append(values[:room])
            tokens, marks = tokens[room:], marks[room:]
        self.num_tokens += len(ids)
        self.num_documents += 1

    def parts(self) -> tuple[Part, ...]:
        """What was written; complete once the writer is closed."""
        return tuple(
            Part(
                tokens_file=tokens.name,
                marks_file=marks.name,
                num_tokens=tokens.length,
                tokens_sha256=tokens.hash.hexdigest(),
                marks_sha256=marks.hash.hexdigest(),
            )
            for tokens, marks in self._files
        )

    def _begin(self) -> None:
        self.close()
        number = f"{len(self._files):05d}.bin"
        tokens, marks = (self._folder / f"{kind}-{number}" for kind in ("tokens", "marks"))
        self._files.append((_File(tokens), _File(marks)))

    def close(self) -> None:
        """Close the files of the part that is being written."""
        for file in self._files[-1] if self._files else ():
            file.stream.close()


class _File:
    """One file that is being written, with its running checksum."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.length = 0  # numbers, not bytes
        self.hash = hashlib.sha256()
        self.stream: BinaryIO = path.open("wb")

    def append(self, values: TokenArray) -> None:
        data = values.tobytes()
        self.stream.write(data)
        self.hash.update(data)
        self.length += len(values)
