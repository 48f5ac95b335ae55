"""Memory that native passes use again: never while somebody looks, and no more with each token."""

import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from property.test_native_int8 import int8_model
from tiny_models import random_ids
from twotower.model.rows import keep_rows
from twotower.native import buffers


def parts_of(layers: Sequence[object]) -> list[Tensor]:
    return [part for state in layers if isinstance(state, tuple) for part in state]


@pytest.mark.parametrize("length", [1, 5, 16])
def test_memory_is_not_used_again_while_somebody_looks(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Guards frozen views and copies of a cache: states that a later pass overwrites in place would
    be those of another text."""
    monkeypatch.setattr(buffers, "_MIN_KEPT", 0)
    ours = int8_model()
    cache = ours.prefill(random_ids(2, 9))
    kept: list[tuple[list[Tensor], list[Tensor]]] = []
    for step in range(6):
        parts = parts_of(cache.view().layers)
        kept.append((parts, [part.clone() for part in parts]))
        output = ours.verify(cache, random_ids(2, length, seed=step))
        ours.extend(cache, random_ids(2, length, seed=step))
        again = ours.prefill(random_ids(2, 9))
        again.commit(ours.verify(again, random_ids(2, length)), torch.tensor([length, length]))
        del output
    for parts, values in kept:
        assert all(torch.equal(a, b) for a, b in zip(parts, values, strict=True))


def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the other side: memory that is never used again."""
    monkeypatch.setattr(buffers, "_MIN_KEPT", 0)
    ours = int8_model()
    cache = ours.prefill(random_ids(2, 9))
    held = []
    for step in range(12):
        ours.extend(cache, random_ids(2, 1, seed=step))
        held.append(sum(map(len, ours.backend._pool._buffers)))
    assert len(set(held[4:])) == 1


def test_remembered_addresses_keep_no_memory() -> None:
    """Guards the memory of a server: states before the newest ones, or keys of rows that left,
    would live as long as their cache, beside what took their place."""
    ours = int8_model()
    cache = ours.prefill(random_ids(16, 9))
    for change in (
        lambda: ours.extend(cache, random_ids(16, 200)),
        lambda: keep_rows(cache, [3]),
    ):
        before = [weakref.ref(part) for part in parts_of(cache.buffers)]
        change()
        assert not any(part() is not None for part in before)
