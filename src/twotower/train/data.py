"""The order in which training reads a token shard.

A row is a window of `sequence_length` tokens, moved to the first document that begins in it; a
document longer than that goes on in the next windows. The last 1 % of the windows are held out for
validation. Decides the order: row i of a run is a function of (seed, i) alone, so a position is one
number and resuming needs no other state. What a shard is on disk is the matter of `train.shard`.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from twotower.train.shard import Shard

HELD_OUT = 0.01  # share of the rows that training never sees


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a shard: tokens (B, L) int64 and which of them belong to completions (B, L) bool."""

    tokens: Tensor
    is_completion: Tensor


class Rows:
    """The rows of a shard: training rows, shuffled anew each epoch, and held-out rows."""

    def __init__(
        self, shard: Shard, sequence_length: int, seed: int, unaligned_fraction: float = 0.0
    ) -> None:
        """ValueError if the shard is too short for one training row and one held-out row.

        Of the training rows, `unaligned_fraction` begin up to the shard's alignment earlier.
        """
        self.shard = shard
        self.sequence_length = sequence_length
        self.seed = seed
        self.unaligned_fraction = unaligned_fraction
        if unaligned_fraction > 0.0 and shard.meta.align == 1:
            raise ValueError(
                f"unaligned_row_fraction: no effect on {shard.folder}, which is not aligned; "
                "prepare it with an alignment"
            )
        if sequence_length % shard.meta.align:
            raise ValueError(
                f"sequence_length: {sequence_length} is not a multiple of {shard.meta.align}, to "
                f"which {shard.folder} is aligned"
            )
        total = len(shard.tokens) // sequence_length
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
        shift = (self.unaligned_fraction,) if self.unaligned_fraction else ()
        parts = (self.shard.meta.tokens_sha256, self.sequence_length, self.seed, HELD_OUT, *shift)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def training(self, start: int, count: int) -> Batch:
        """Rows number `start` to `start + count - 1` of the endless training order."""
        starts = [self._start(self._shuffled(start + i)) for i in range(count)]
        shifts = [self._shift(start + i) for i in range(count)]
        return self._read([max(0, s - shift) for s, shift in zip(starts, shifts, strict=True)])

    def held_out(self, start: int, count: int) -> Batch:
        """Held-out rows in file order, fewer than `count` at the end."""
        stop = min(start + count, self.num_held_out)
        first = self._total - self.num_held_out
        return self._read([self._start(first + i) for i in range(start, stop)])

    def _shuffled(self, index: int) -> int:
        epoch, offset = divmod(index, self.num_training)
        return int(_epoch_order(self.num_training, self.seed, epoch)[offset])

    def _shift(self, index: int) -> int:
        """How many tokens earlier than on a boundary row `index` of the order begins."""
        if self.unaligned_fraction == 0.0:
            return 0
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, index])))
        is_shifted = generator.random() < self.unaligned_fraction
        return int(generator.integers(1, self.shard.meta.align)) if is_shifted else 0

    def _read(self, starts: list[int]) -> Batch:
        spans = [slice(start, start + self.sequence_length) for start in starts]
        tokens = np.stack([self.shard.tokens[span] for span in spans]).astype(np.int64)
        if tokens.max() >= self.shard.meta.vocab_size:
            raise ValueError(
                f"data: {self.shard.folder} has token {tokens.max()} in the rows at {starts}, "
                f"outside its vocabulary of {self.shard.meta.vocab_size}; prepare the data again"
            )
        completions = np.stack([self.shard.is_completion(span) for span in spans])
        return Batch(tokens=torch.from_numpy(tokens), is_completion=torch.from_numpy(completions))

    def _start(self, index: int) -> int:
        """Where window `index` begins, moved to the first document that begins in it.

        A prompt is read with nothing before it: a model that never trained on rows which begin
        there meets that state for the first time when it generates.
        """
        length, num_tokens = self.sequence_length, len(self.shard.tokens)
        start = index * length
        begins = self.shard.beginnings(slice(start, start + length))
        if len(begins):
            align = self.shard.meta.align
            first = int(begins[0]) // align * align  # with what fills up the first block
            start = min(start + first, (num_tokens - length) // align * align)
        return start


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch_order(
    num_rows: int, seed: int, epoch: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(num_rows)
