"""The order in which training reads a shard, and its held-out rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_training import make_shard, set_meta
from twotower.train.data import Rows
from twotower.train.shard import Shard


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    return make_shard(tmp_path / "shard")


def naive_rows(folder: Path, length: int) -> list[list[int]]:
    """Every window, moved to its first <bos>; one at the end of the stream stays inside it."""
    stream = np.fromfile(folder / "tokens.bin", dtype="<u2").tolist()
    rows = []
    for start in range(0, len(stream) - length + 1, length):
        begins = [i for i in range(start, start + length) if stream[i] == 1]
        start = min(begins[0] if begins else start, len(stream) - length)
        rows.append(stream[start : start + length])
    return rows


def test_every_epoch_visits_each_training_row_once(shard_folder: Path) -> None:
    """Silent failure: rows are repeated or never seen, or epochs repeat one order."""
    rows = Rows(Shard(shard_folder), 32, seed=5)
    count = rows.num_training
    first, second = rows.training(0, count).tokens, rows.training(count, count).tokens
    expected = sorted(naive_rows(shard_folder, 32)[:count])
    assert sorted(first.tolist()) == expected == sorted(second.tolist())
    assert not torch.equal(first, second)


def test_rows_begin_with_a_document_where_one_begins(shard_folder: Path) -> None:
    """Silent failure: the model never trains on the state in which every prompt starts."""
    rows = (
        Rows(Shard(shard_folder), 32, seed=5).training(0, 50).tokens
    )  # documents are shorter than rows
    assert (rows[:, 0] == 1).all()
    inside = Rows(Shard(shard_folder), 4, seed=5)  # most windows lie inside a document
    starts = inside.training(0, inside.num_training).tokens[:, 0] == 1
    assert starts.any() and not starts.all()


def test_rows_of_an_aligned_shard_keep_the_alignment(tmp_path: Path) -> None:
    """Silent failure: a row moved to its first <bos> puts every completion across two blocks."""
    folder = make_shard(tmp_path / "shard", align=8)
    shard = Shard(folder)
    rows = Rows(shard, 32, seed=5)
    for row in rows.training(0, rows.num_training).tokens.tolist():
        assert row.index(1) < 8
    positions = np.flatnonzero(shard.tokens[:] == 1)
    starts = {tuple(shard.tokens[i // 8 * 8 :][:32].tolist()) for i in positions}
    whole = [row for row in map(tuple, rows.training(0, 20).tokens.tolist()) if row in starts]
    assert len(whole) == 20  # every row is a stretch that starts where a document's block starts
    with pytest.raises(ValueError, match="sequence_length: 20 is not a multiple of 8"):
        Rows(shard, 20, seed=5)


def test_order_is_a_function_of_seed_and_position(shard_folder: Path) -> None:
    """Silent failure: a resumed run reads other rows than the unbroken one."""
    whole = Rows(Shard(shard_folder), 32, seed=5).training(0, 500).tokens  # beyond one epoch
    again = Rows(Shard(shard_folder), 32, seed=5)
    assert torch.equal(
        torch.cat([again.training(start, 50).tokens for start in range(0, 500, 50)]), whole
    )
    assert not torch.equal(Rows(Shard(shard_folder), 32, seed=6).training(0, 500).tokens, whole)


def test_shifted_rows_begin_inside_the_block_before(tmp_path: Path) -> None:
    """Silent failure: blocks of self-speculation, which start anywhere, are never trained on."""
    shard = Shard(make_shard(tmp_path / "shard", align=8))
    plain = Rows(shard, 32, seed=5).training(0, 400).tokens
    shifted = Rows(shard, 32, seed=5, unaligned_fraction=0.5).training(0, 400).tokens
    stream = shard.tokens[:].astype(np.int64)
    offsets = []
    for one, other in zip(plain.numpy(), shifted.numpy(), strict=True):
        shifts = [n for n in range(8) if np.array_equal(other[n:], one[: len(one) - n])]
        assert shifts
        offsets.append(shifts[0])
    assert 150 < sum(offset > 0 for offset in offsets) < 250 and max(offsets) == 7
    assert any(np.array_equal(stream[i : i + 32], shifted[0]) for i in range(len(stream)))
    with pytest.raises(ValueError, match="unaligned_row_fraction: no effect"):
        Rows(Shard(make_shard(tmp_path / "packed")), 32, seed=5, unaligned_fraction=0.5)


def test_held_out_rows_are_never_trained_on(tmp_path: Path) -> None:
    """Silent failure: the validation loss is measured on training rows."""
    folder = make_shard(tmp_path / "shard", count=2000)
    rows = Rows(Shard(folder), 16, seed=0)
    windows = naive_rows(folder, 16)
    held_out = windows[-rows.num_held_out :]
    assert rows.num_held_out == len(windows) // 100 > 1
    assert rows.held_out(0, 10_000).tokens.tolist() == held_out
    assert rows.held_out(1, 2).tokens.tolist() == held_out[1:3]
    # The furthest that a training row can reach is the end of the window after its own.
    indices = {rows._shuffled(i) for i in range(rows.num_training)}
    assert indices == set(range(len(windows) - rows.num_held_out - 1))


def test_fingerprint_changes_with_what_changes_the_order(shard_folder: Path) -> None:
    shard = Shard(shard_folder)
    prints = {Rows(shard, n, s).fingerprint for n, s in [(32, 0), (16, 0), (32, 1)]}
    assert len(prints) == 3
    assert Rows(Shard(shard_folder), 32, 0).fingerprint in prints


def test_too_short_a_shard_is_refused(shard_folder: Path) -> None:
    with pytest.raises(ValueError, match="too few for rows of sequence_length=100000"):
        Rows(Shard(shard_folder), 100_000, 0)


def test_tokens_outside_the_vocabulary_are_refused(shard_folder: Path) -> None:
    """A shard whose vocab_size is wrong would index past the embeddings."""
    set_meta(shard_folder, vocab_size=20)
    with pytest.raises(ValueError, match="outside its vocabulary of 20"):
        Rows(Shard(shard_folder), 32, 0).training(0, 4)
