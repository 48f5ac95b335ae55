"""The cache's bookkeeping: shapes, growing buffers, counts, views; values are in property tests."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tiny_models import random_ids, tiny_model
from twotower import ContextCache
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.rows import append_rows, keep_rows, select_rows
from twotower.model.state import ForwardOutput

MODEL = tiny_model()


def attention_cache(num_rows: int) -> ContextCache:
    """A cache of one attention layer with one head of size 1: a key is a number."""
    empty = torch.empty(num_rows, 0, 1, 1)
    return ContextCache([KV(empty, empty)], num_rows)


def append(cache: ContextCache, values: list[list[float]], counts: list[int] | None = None) -> None:
    """Commit keys (rows, tokens); values are minus the keys, the hidden state is the key."""
    keys = torch.tensor(values)[..., None, None]
    n = torch.tensor([keys.shape[1]] * len(keys) if counts is None else counts)
    cache.commit(cache.output_of(keys[..., 0], [KV(keys, -keys)]), n)


def keys(cache: ContextCache) -> Tensor:
    (state,) = cache.layers
    assert isinstance(state, KV)
    assert torch.equal(state.v, -state.k)
    return state.k[..., 0, 0]


def test_shapes_and_dtypes() -> None:
    cache = MODEL.prefill(random_ids(2, 5))
    mamba, attention, moe, mlp = cache.layers[:4]
    assert moe is None and mlp is None
    assert isinstance(attention, KV) and isinstance(mamba, MambaState)
    assert attention.k.shape == attention.v.shape == (2, 5, 2, 8)
    assert mamba.conv.shape == (2, 4 * 8 + 2 * 2 * 8, 3)
    assert mamba.ssm.shape == (2, 4, 8, 8)
    assert (cache.num_rows, cache.num_past, cache.is_uniform) == (2, 5, True)
    assert cache.lengths.device.type == "cpu"


def test_a_view_of_some_layers_has_just_these() -> None:
    """Guards thin denoisers: they would read another layer, or pay for all."""
    cache = MODEL.prefill(random_ids(2, 5))
    whole, some = cache.view(), cache.view([1])
    (one, other) = whole.layers[1], some.layers[1]
    assert isinstance(one, KV) and isinstance(other, KV)
    assert all(map(torch.equal, one, other))
    assert [layer for layer, state in enumerate(some.layers) if state is not None] == [1]


def test_room_behind_the_tokens_is_no_part_of_the_cache() -> None:
    """Guards passes that write where the cache will be: an unfinished block would be text, or what
    is written there would be lost."""
    cache = attention_cache(2)
    append(cache, [[1.0, 2.0], [3.0, 4.0]], [2, 1])
    (state,) = cache.make_room(3)
    assert isinstance(state, KV) and state.k.shape[1] >= 5
    for row, length in enumerate(cache.lengths.tolist()):
        state.k[row, length : length + 3] = torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1)
        state.v[row, length : length + 3] = -torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1)
    assert cache.lengths.tolist() == [2, 1]
    output = ForwardOutput(torch.zeros(2, 3, 1), cache.version, lambda counts: [], cache.move_keys)
    cache.commit(output, torch.tensor([1, 3]))
    assert cache.lengths.tolist() == [3, 4]
    assert keys(cache)[0, :3].tolist() == [1.0, 2.0, 7.0]
    assert keys(cache)[1].tolist() == [3.0, 7.0, 8.0, 9.0]


def test_an_empty_cache() -> None:
    cache = MODEL.empty_cache(3)
    assert (cache.num_rows, cache.num_past, cache.is_uniform) == (3, 0, True)
    assert cache.last_hidden is None
    for state in cache.layers:
        if isinstance(state, KV):
            assert state.k.shape[1] == 0
        elif state is not None:
            assert not any(bool(part.any()) for part in state)


def test_buffers_grow_by_doubling_and_keep_their_content() -> None:
    """Guards the cost of decoding: growing by one token at a time copies the text every token, and
    without room behind a prompt its first draft copies it."""
    cache = attention_cache(1)
    sizes = []
    for token in range(1, 300):
        append(cache, [[float(token)]])
        (state,) = cache.buffers
        assert isinstance(state, KV)
        sizes.append(state.k.shape[1])
        assert keys(cache).tolist() == [[float(n) for n in range(1, token + 1)]]
    assert sizes == [65] * 65 + [131] * 66 + [263] * 132 + [527] * 36
    append(cache, [[0.0] * 1500])
    append(cache, [[0.0] * 1000])
    (state,) = cache.buffers
    assert isinstance(state, KV) and state.k.shape[1] == 299 + 1500 + 1000 + 1024


@pytest.mark.parametrize("counts", [[3, 3], [2, 4]])
def test_what_is_committed_has_no_gradients(counts: list[int]) -> None:
    """Guards memory: with them a cache would hold every pass that was ever made."""
    assert any(parameter.requires_grad for parameter in MODEL.parameters())
    cache = MODEL.prefill(random_ids(2, 5))
    cache.commit(MODEL.verify(cache, random_ids(2, 4)), torch.tensor(counts))
    parts = [part for state in cache.buffers if state for part in state]
    assert cache.last_hidden is not None and parts
    logits = MODEL.next_logits(cache), MODEL.denoise(random_ids(2, 4), cache.view(), None)
    assert not any(part.requires_grad for part in (cache.last_hidden, *parts, *logits))


def test_rows_commit_different_numbers_of_tokens() -> None:
    """Guards positions: what a row did not commit is overwritten by its next token."""
    cache = attention_cache(3)
    append(cache, [[1, 2], [3, 99], [98, 97]], [2, 1, 0])
    assert cache.lengths.tolist() == [2, 1, 0]
    assert not cache.is_uniform
    assert cache.last_hidden is not None
    assert cache.last_hidden[:2, 0].tolist() == [2.0, 3.0]
    append(cache, [[4, 96], [5, 6], [7, 8]], [1, 2, 2])
    assert cache.lengths.tolist() == [3, 3, 2]
    found = [row[:n] for row, n in zip(keys(cache).tolist(), cache.lengths.tolist(), strict=True)]
    assert found == [[1, 2, 4], [3, 5, 6], [7, 8]]
    assert cache.last_hidden[:, 0].tolist() == [4.0, 6.0, 8.0]
    append(cache, [[95], [94], [9]], [0, 0, 1])
    assert cache.is_uniform
    assert keys(cache).tolist() == [[1, 2, 4], [3, 5, 6], [7, 8, 9]]
    assert cache.last_hidden[:, 0].tolist() == [4.0, 6.0, 9.0], "rows without a token keep theirs"


def test_select_copies() -> None:
    cache = attention_cache(3)
    append(cache, [[1, 2], [3, 4], [5, 6]], [2, 1, 2])
    few = select_rows(cache, torch.tensor([2, 1]))
    assert few.lengths.tolist() == [2, 1]
    append(few, [[7], [8]])
    assert keys(few).tolist()[0] == [5, 6, 7]
    assert keys(few).tolist()[1][:2] == [3, 8]
    assert few.last_hidden is not None
    assert few.last_hidden[:, 0].tolist() == [7.0, 8.0]
    assert cache.lengths.tolist() == [2, 1, 2]
    assert keys(cache).tolist()[2] == [5, 6]
    assert select_rows(attention_cache(2), torch.tensor([1])).last_hidden is None


@pytest.mark.parametrize("number", [1, 2])
def test_an_append_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Guards rows that are tried again after memory ran out: by `extend`, and by `accept`."""
    cache = MODEL.prefill(random_ids(2, 5))
    before = [part.clone() for state in cache.layers if state for part in state]
    lengths, hidden = cache.lengths.clone(), cache.last_hidden
    tokens = random_ids(2, 3, seed=1)

    def scarce(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(ContextCache, "_newest", scarce)
        if number == 1:
            MODEL.extend(cache, tokens)
        else:
            cache.commit(MODEL.verify(cache, tokens), torch.tensor([1, 3]))
    assert torch.equal(cache.lengths, lengths) and cache.last_hidden is hidden
    after = [part for state in cache.layers if state for part in state]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_view_is_frozen_and_names_lengths_only_where_rows_differ() -> None:
    view = MODEL.prefill(random_ids(2, 5)).view()
    assert view.lengths is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.num_past = 0  # type: ignore[misc]
    ragged = MODEL.prefill(random_ids(2, 5), torch.tensor([5, 2])).view()
    assert ragged.lengths is not None
    assert ragged.lengths.tolist() == [5, 2]
    one = ragged.select(torch.tensor([1]))
    assert one.lengths is not None
    assert (one.lengths.tolist(), one.num_rows, one.num_past) == ([2], 1, 5)
    state = one.layers[0]
    assert isinstance(state, MambaState)
    assert state.ssm.shape[:2] == (1, 1), "rows, blocks"


def test_a_view_moves_between_devices() -> None:
    """Guards towers on two devices; the meta device stands for the second."""
    view = MODEL.prefill(random_ids(1, 3)).view()
    moved = view.to("meta")
    states = [state for state in moved.layers if state is not None]
    assert states
    assert all(part.device.type == "meta" for state in states for part in state)
    same = view.to("cpu")
    assert all(
        a is b
        for x, y in zip(view.layers, same.layers, strict=True)
        if x is not None and y is not None
        for a, b in zip(x, y, strict=True)
    ), "no copy where nothing moves"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MODEL.prefill(random_ids(2, 3), torch.tensor([1, 4])), "between 0 and 3"),
        (lambda: MODEL.prefill(random_ids(2, 3)[0]), "must be"),
        (lambda: MODEL.prefill(random_ids(2, 3).int()), "int64"),
        (lambda: MODEL.context_logits(random_ids(2, 3)[:, :0]), "tokens >= 1"),
        (
            lambda: MODEL.extend(MODEL.empty_cache(3), random_ids(2, 1)),
            "2 rows but the cache has 3",
        ),
    ],
)
def test_wrong_arguments_are_one_line(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [[1], [0, 3], [3, 1], [0, 1, 2, 4], [2, 3, 4], [4, 3, 2, 1, 0]])
def test_rows_that_leave_and_enter_change_no_other(kept: list[int]) -> None:
    """Guards the slots of rows in a cache: each goes on as alone, also in the slot of a row whose
    keys were not finite.
    """
    lengths = torch.tensor([7, 3, 5, 1, 6])
    cache = MODEL.prefill(random_ids(5, 7), lengths)
    alone = {row: select_rows(cache, torch.tensor([row])) for row in range(5)}
    gone = [row for row in range(5) if row not in kept]
    for state in cache.layers:
        if isinstance(state, KV):
            state.k[gone], state.v[gone] = torch.nan, torch.nan
    order = keep_rows(cache, kept)
    assert sorted(order) == sorted(kept)
    newcomer = MODEL.prefill(random_ids(1, 2, seed=3))
    append_rows(cache, newcomer)
    caches = [*(alone[row] for row in order), newcomer]
    assert cache.lengths.tolist() == [int(one.lengths) for one in caches]
    for seed in range(3):  # the last goes beyond the room of before
        tokens = random_ids(len(caches), 60 if seed == 2 else 3, seed=seed)
        MODEL.extend(cache, tokens)
        for row, one in enumerate(caches):
            MODEL.extend(one, tokens[row : row + 1])
        expected = torch.cat([MODEL.next_logits(one) for one in caches])
        torch.testing.assert_close(MODEL.next_logits(cache), expected, rtol=0, atol=2e-4)


def test_a_cache_that_lost_most_rows_gives_their_memory_back() -> None:
    """Guards a server's memory after a crowd."""
    cache = attention_cache(16)
    append(cache, [[1]] * 16)
    keep_rows(cache, [3])
    state = cache.layers[0]
    assert isinstance(state, KV) and len(state.k.untyped_storage()) <= 4 * state.k.nbytes
