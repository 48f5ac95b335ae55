"""Writes the files of a token shard as documents arrive.

Decides where one file ends and the next begins: at a number of tokens, also inside a document,
because readers see one stream.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from twotower.train.shard import BYTE, DTYPES, Part, TokenArray

PART_TOKENS = 1 << 27  # in one file: 256 MB of uint16


class ShardWriter:
    """Appends documents to the parts of a shard, counting on the way; a context manager."""

    def __init__(self, folder: Path, dtype: str, part_tokens: int = PART_TOKENS) -> None:
        self.dtype = dtype
        self.num_tokens = 0
        self.num_documents = 0
        self._tokens = _Files(folder, "tokens", DTYPES[dtype], part_tokens)
        self._completions = _Files(folder, "completions", BYTE, part_tokens)

    def append(self, ids: list[int], context: int) -> None:
        """Write a document, of whose tokens the first `context` stand before its completion."""
        is_completion = np.ones(len(ids), dtype=BYTE)
        is_completion[:context] = 0
        self._tokens.append(np.asarray(ids, dtype=self._tokens.dtype))
        self._completions.append(is_completion)
        self.num_tokens += len(ids)
        self.num_documents += 1

    def parts(self) -> tuple[Part, ...]:
        """What was written; complete once the writer is closed."""
        return tuple(
            Part(
                tokens_file=tokens.name,
                completions_file=completions.name,
                num_tokens=tokens.length,
                tokens_sha256=tokens.hash.hexdigest(),
                completions_sha256=completions.hash.hexdigest(),
            )
            for tokens, completions in zip(self._tokens.files, self._completions.files, strict=True)
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tokens.close()
        self._completions.close()


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


class _Files:
    """A stream of numbers cut into numbered files of `limit` each, the last one shorter."""

    def __init__(
        self, folder: Path, kind: str, dtype: np.dtype[np.unsignedinteger], limit: int
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.dtype = dtype
        self.limit = limit
        self.files: list[_File] = []

    def append(self, values: TokenArray) -> None:
        while len(values):
            if not self.files or self.files[-1].length == self.limit:
                self._begin()
            current = self.files[-1]
            room = self.limit - current.length
            current.append(values[:room])
            values = values[room:]

    def _begin(self) -> None:
        self.close()
        self.files.append(_File(self.folder / f"{self.kind}-{len(self.files):05d}.bin"))

    def close(self) -> None:
        if self.files:
            self.files[-1].stream.close()
