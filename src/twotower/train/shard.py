"""What a token shard is on disk, and its memory-mapped view.

A shard is a folder: `tokens-00000.bin`, ... (little-endian uint16 or uint32, one stream of tokens
cut into files), `completions-00000.bin`, ... (uint8, 1 where a token belongs to a completion or is
the EOS behind it; cut at the same places), `meta.json` (what it is, with checksums) and the
tokenizer's files. Format 2 had one file of each kind and is still read. Where the files are cut has
no meaning: readers see one stream.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

META_FILE = "meta.json"
FORMAT = 3
TokenArray = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]
DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
BYTE: np.dtype[np.unsignedinteger] = np.dtype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A pair of files of a shard: the same stretch of tokens and of completion marks."""

    tokens_file: str
    completions_file: str
    num_tokens: int
    tokens_sha256: str
    completions_sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardMeta:
    """What `meta.json` says about a shard; `sources` are tokens by name."""

    vocab_size: int
    bos_id: int
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
        dtype, parts = DTYPES[self.meta.dtype], self.meta.parts
        self.tokens = TokenStream(
            [
                _map(self.folder / part.tokens_file, dtype, part.num_tokens, part.tokens_sha256)
                for part in parts
            ]
        )
        self.completions = TokenStream(
            [
                _map(
                    self.folder / part.completions_file,
                    BYTE,
                    part.num_tokens,
                    part.completions_sha256,
                )
                for part in parts
            ]
        )

    def num_rows(self, sequence_length: int) -> int:
        return len(self.tokens) // sequence_length


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
        is_known = found[0] in (2, FORMAT) and found[1] in DTYPES
        meta = _parse_meta(content) if is_known else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"data: {file} is damaged ({error}); prepare the data again") from error
    if meta is None:
        raise ValueError(
            f"data: {file} has format {found[0]!r} and dtype {found[1]!r}; this version reads "
            f"formats 2 and {FORMAT} with {' or '.join(DTYPES)}: prepare the data again"
        )
    return meta


def _parse_meta(content: dict[str, Any]) -> ShardMeta:
    if content["format"] == 2:
        names = {"tokens_file": "tokens.bin", "completions_file": "completions.bin"}
        sums = {name: content.pop(name) for name in ("tokens_sha256", "completions_sha256")}
        content["sources"] = {content.pop("source"): content["num_tokens"]}
        content["parts"] = [names | sums | {"num_tokens": content["num_tokens"]}]
    parts = tuple(Part(**part) for part in content.pop("parts"))
    return ShardMeta(**content | {"parts": parts})


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
    if sha256_of(file) != sha256:
        raise ValueError(
            f"data: {file} does not match its checksum, it is corrupt; prepare the data again"
        )
    return np.memmap(file, dtype=dtype, mode="r", shape=(num_tokens,))


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def choose_dtype(vocab_size: int) -> str:
    """The narrowest token type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"
