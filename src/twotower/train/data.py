"""Token shards on disk and the order in which training reads them.

A shard is a folder: `tokens.bin` (little-endian uint16 or uint32, one stream of tokens),
`meta.json` (what it is, with checksums) and the tokenizer's files; `train.prepare` writes it. A row
is a window of `sequence_length` tokens, moved to the first document that begins in it. The last 1 %
of the windows are held out for validation. Decides the order: row i of a run is a function of
(seed, i) alone, so a position is one number and resuming needs no other state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TOKENS_FILE = "tokens.bin"
META_FILE = "meta.json"
FORMAT = 1
HELD_OUT = 0.01  # share of the rows that training never sees
TokenArray = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]
_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}


@dataclass(frozen=True, kw_only=True)
class ShardMeta:
    """What `meta.json` says about a shard."""

    vocab_size: int
    bos_id: int
    num_tokens: int
    num_documents: int
    dtype: str
    tokens_sha256: str
    tokenizer_sha256: str
    source: str
    seed: int
    align: int = 1
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        (folder / META_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


class Shard:
    """One validated, memory-mapped token stream. Opening it reads the file once, for its
    checksum.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.tokens = _map_tokens(self.folder / TOKENS_FILE, self.meta)

    def num_rows(self, sequence_length: int) -> int:
        return len(self.tokens) // sequence_length


class Rows:
    """The rows of a shard, split into training rows (shuffled anew each epoch) and held-out
    rows.
    """

    def __init__(self, shard: Shard, sequence_length: int, seed: int) -> None:
        """ValueError if the shard is too short for one training row and one held-out row."""
        self.shard = shard
        self.sequence_length = sequence_length
        self.seed = seed
        if sequence_length % shard.meta.align:
            raise ValueError(
                f"sequence_length: {sequence_length} is not a multiple of {shard.meta.align}, to "
                f"which {shard.folder} is aligned"
            )
        total = shard.num_rows(sequence_length)
        if total < 3:
            raise ValueError(
                f"data: {shard.folder} holds {len(shard.tokens)} tokens, too few for rows of "
                f"sequence_length={sequence_length}; prepare at least {3 * sequence_length}"
            )
        self._total = total
        self.num_held_out = max(1, int(total * HELD_OUT))
        # One window lies between: a row that is moved to a document ends in the next window.
        self.num_training = total - self.num_held_out - 1

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the order of rows would: another shard, row length or seed."""
        parts = (self.shard.meta.tokens_sha256, self.sequence_length, self.seed, HELD_OUT)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def training(self, start: int, count: int) -> Tensor:
        """Rows number `start` to `start + count - 1` of the endless training order; (count, L)
        int64.
        """
        return self._read([self._shuffled(start + i) for i in range(count)])

    def held_out(self, start: int, count: int) -> Tensor:
        """Held-out rows in file order, fewer than `count` at the end; (<= count, L) int64."""
        stop = min(start + count, self.num_held_out)
        return self._read([self._total - self.num_held_out + i for i in range(start, stop)])

    def _shuffled(self, index: int) -> int:
        epoch, offset = divmod(index, self.num_training)
        return int(_epoch_order(self.num_training, self.seed, epoch)[offset])

    def _read(self, indices: list[int]) -> Tensor:
        rows = np.stack([self._row(i) for i in indices]).astype(np.int64)
        if rows.max() >= self.shard.meta.vocab_size:
            raise ValueError(
                f"data: {self.shard.folder} has token {rows.max()} in rows {indices}, outside its "
                "vocabulary "
                f"of {self.shard.meta.vocab_size}; prepare the data again"
            )
        return torch.from_numpy(rows)

    def _row(self, index: int) -> TokenArray:
        """Window `index`, moved to the first document that begins in it.

        A prompt is read from its <bos> with nothing before it: a model that never trained on rows
        which begin there meets that state for the first time when it generates.
        """
        length, tokens = self.sequence_length, self.shard.tokens
        start = index * length
        begins = np.flatnonzero(tokens[start : start + length] == self.shard.meta.bos_id)
        if len(begins):
            align = self.shard.meta.align
            first = int(begins[0]) // align * align  # with what fills up the first block
            start = min(start + first, (len(tokens) - length) // align * align)
        return tokens[start : start + length]


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch_order(
    num_rows: int, seed: int, epoch: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(num_rows)


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
        meta = ShardMeta(**content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"data: {file} is damaged ({error}); prepare the data again") from error
    if meta.format != FORMAT or meta.dtype not in _DTYPES:
        raise ValueError(
            f"data: {file} has format {meta.format!r} and dtype {meta.dtype!r}; this version reads "
            f"format {FORMAT} "
            f"with {' or '.join(_DTYPES)}: prepare the data again"
        )
    return meta


def _map_tokens(file: Path, meta: ShardMeta) -> TokenArray:
    dtype = _DTYPES[meta.dtype]
    size = file.stat().st_size if file.is_file() else 0
    if size == 0:
        raise ValueError(f"data: {file} is missing or empty; prepare the data again")
    if size != meta.num_tokens * dtype.itemsize:
        raise ValueError(
            f"data: {file} has {size} bytes where {META_FILE} promises "
            f"{meta.num_tokens * dtype.itemsize}; "
            "the file is cut or mixed up: prepare the data again"
        )
    if sha256_of(file) != meta.tokens_sha256:
        raise ValueError(
            f"data: {file} does not match its checksum, it is corrupt; prepare the data again"
        )
    return np.memmap(file, dtype=dtype, mode="r", shape=(meta.num_tokens,))


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def choose_dtype(vocab_size: int) -> str:
    """The narrowest token type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def numpy_dtype(name: str) -> np.dtype[np.unsignedinteger]:
    return _DTYPES[name]
