"""The context's state: any way of building it gives the same, and reading changes nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiny_models import masked_like, random_ids, row_state, tiny_model
from twotower import ContextCache
from twotower.layers.attention import KV
from twotower.model.rows import select_rows

MODEL = tiny_model()
# float32 rounding of sums in another order, through 6 layers
CLOSE = {"rtol": 0.0, "atol": 2e-4}
splits = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def assert_same_rows(ours: ContextCache, row: int, other: ContextCache, other_row: int) -> None:
    for a, b in zip(row_state(ours, row), row_state(other, other_row), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def snapshot(cache: ContextCache) -> list[Tensor]:
    return [part.clone() for state in cache.layers if state is not None for part in state]


@given(pieces=splits, chunk_size=st.integers(1, 20), seed=st.integers(0, 20))
def test_any_split_gives_the_state_of_the_whole(
    pieces: list[int], chunk_size: int, seed: int
) -> None:
    """Guards prefill, AR decoding and extension against each other: a conv state that is wrong
    after pieces shorter than W, or a scan that forgets its seed, ruins only later tokens."""
    ids = random_ids(2, sum(pieces), seed=seed)
    whole = MODEL.prefill(ids, chunk_size=10**6)
    parts = ids.split(pieces, dim=1)
    cache = MODEL.prefill(parts[0], chunk_size=chunk_size)
    for part in parts[1:]:
        MODEL.extend(cache, part)
    assert cache.lengths.tolist() == whole.lengths.tolist() == [ids.shape[1]] * 2
    for row in range(2):
        assert_same_rows(cache, row, whole, row)
    with torch.no_grad():
        at_once = MODEL.context_logits(ids)[:, -1]
    torch.testing.assert_close(MODEL.next_logits(cache), at_once, **CLOSE)


def test_extend_returns_the_output_at_every_token() -> None:
    ids = random_ids(2, 12)
    cache = MODEL.prefill(ids[:, :5])
    hidden = MODEL.extend(cache, ids[:, 5:])
    with torch.no_grad():
        expected = MODEL.context_logits(ids)[:, 5:]
        torch.testing.assert_close(MODEL.context_head(hidden), expected, **CLOSE)


@given(
    lengths=st.lists(st.integers(0, 13), min_size=2, max_size=4).filter(any),
    counts=st.lists(st.integers(0, 6), min_size=4, max_size=4).filter(any),
    chunk_size=st.integers(1, 14),
    seed=st.integers(0, 20),
)
def test_rows_of_different_lengths_are_as_alone(
    lengths: list[int], counts: list[int], chunk_size: int, seed: int
) -> None:
    """Guards batching: padding that reaches a state, or a key that one row sees of another's
    length, changes texts only when prompts differ in length."""
    counts = counts[: len(lengths)]
    ids = random_ids(len(lengths), max(lengths), seed=seed)
    more = random_ids(len(lengths), 6, seed=seed + 1)
    cache = MODEL.prefill(ids, torch.tensor(lengths), chunk_size)
    MODEL.extend(cache, more, torch.tensor(counts))
    block = masked_like(random_ids(len(lengths), 4, seed=seed + 2), seed)
    t = torch.linspace(0.2, 1.0, len(lengths))
    together = MODEL.denoise(block, cache.view(), t)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        text = torch.cat([ids[row : row + 1, :length], more[row : row + 1, :count]], dim=1)
        alone = MODEL.prefill(text) if text.shape[1] else MODEL.empty_cache(1)
        if text.shape[1]:
            assert_same_rows(cache, row, alone, 0)
        expected = MODEL.denoise(block[row : row + 1], alone.view(), t[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], expected, **CLOSE)


def test_what_padding_holds_does_not_matter() -> None:
    """Guards against padding that is hidden only by luck of its value."""
    lengths = torch.tensor([3, 9, 1])
    ids, other = random_ids(3, 9), random_ids(3, 9, seed=1)
    padding = torch.arange(9) >= lengths.unsqueeze(1)
    caches = [MODEL.prefill(x, lengths, 4) for x in (ids, torch.where(padding, other, ids))]
    for cache in caches:
        MODEL.extend(cache, random_ids(3, 2, seed=2))
    block = masked_like(random_ids(3, 4))
    # not bit by bit: padded tokens share the experts' matrix products, whose sizes they change
    one, two = (MODEL.next_logits(cache) for cache in caches)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    one, two = (MODEL.denoise(block, cache.view(), None) for cache in caches)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_hidden_keys_have_no_weight_at_all() -> None:
    """Guards against a mask that makes a key unlikely instead of impossible."""
    lengths = torch.tensor([3, 9])
    block = masked_like(random_ids(2, 4))
    results = []
    for poison in (0.0, 1e4):
        cache = MODEL.prefill(random_ids(2, 9), lengths)
        for state in cache.layers:
            if isinstance(state, KV):
                state.k[0, 3:] = poison
                state.v[0, 3:] = poison
        logits = MODEL.denoise(block, cache.view(), None)
        MODEL.extend(cache, random_ids(2, 2, seed=1))
        results.append((logits, MODEL.next_logits(cache)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unused_buffer_space_is_never_read() -> None:
    """Guards the growing buffers: what lies behind the last token must not reach any result."""
    ids = random_ids(2, 9)
    clean, poisoned = (MODEL.prefill(ids[:, :5], chunk_size=2) for _ in range(2))
    spare = 0
    for state in poisoned.buffers:
        if isinstance(state, KV):
            spare += state.k[:, 5:].numel()
            state.k[:, 5:] = float("nan")
            state.v[:, 5:] = float("nan")
    assert spare > 0, "this test needs room in the buffers"
    block = masked_like(random_ids(2, 4))
    for part in ids[:, 5:].split([1, 2, 1], dim=1):
        for cache in (clean, poisoned):
            MODEL.extend(cache, part)
        assert torch.equal(MODEL.next_logits(clean), MODEL.next_logits(poisoned))
        ours = MODEL.denoise(block, poisoned.view(), None)
        assert torch.equal(ours, MODEL.denoise(block, clean.view(), None))


@pytest.mark.parametrize("lengths", [[7, 7], [7, 2], [0, 7]])
def test_denoising_leaves_the_cache_bit_identical(lengths: list[int]) -> None:
    """Guards the architecture's main claim: nothing of an unfinished block reaches the context."""
    cache = MODEL.prefill(random_ids(2, 7), torch.tensor(lengths))
    before = [*snapshot(cache), MODEL.next_logits(cache)]
    for t in (None, torch.tensor([1.0, 0.25])):
        MODEL.denoise(masked_like(random_ids(2, 5)), cache.view(), t)
    after = [*snapshot(cache), MODEL.next_logits(cache)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("lengths", [[5, 5], [5, 3]])
def test_a_view_is_not_changed_by_later_extensions(lengths: list[int]) -> None:
    """Guards the frozen view: buffers are shared, so an extension must write behind it only."""
    block = masked_like(random_ids(2, 4))
    cache = MODEL.prefill(random_ids(2, 5), torch.tensor(lengths), chunk_size=2)
    view = cache.view()
    before = MODEL.denoise(block, view, None)
    for seed in range(1, 5):
        MODEL.extend(cache, random_ids(2, seed, seed=seed))
        assert torch.equal(MODEL.denoise(block, view, None), before)


def test_an_empty_context_is_zero_states_and_no_keys() -> None:
    """Guards the first block: it must equal block 0 of training."""
    noisy = masked_like(random_ids(2, 4))
    t = torch.tensor([0.5, 1.0])
    logits = MODEL.denoise(noisy, MODEL.empty_cache(2).view(), t)
    with torch.no_grad():
        expected = MODEL.training_logits(random_ids(2, 4), noisy, t, 4)
    torch.testing.assert_close(logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="cache is empty"):
        MODEL.next_logits(MODEL.empty_cache(2))


@pytest.mark.parametrize("rows", [[2], [0, 2], [2, 1, 0], [1, 1]])
def test_selected_rows_go_on_as_before(rows: list[int]) -> None:
    """Guards rows that leave a batch: the others must keep their own past, in their order."""
    lengths, chosen = torch.tensor([4, 9, 1]), torch.tensor(rows)
    cache = MODEL.prefill(random_ids(3, 9), lengths)
    few = select_rows(cache, chosen)
    untouched = snapshot(cache)
    tokens = random_ids(3, 3, seed=1)
    MODEL.extend(few, tokens[chosen])
    assert all(torch.equal(a, b) for a, b in zip(untouched, snapshot(cache), strict=True))
    MODEL.extend(cache, tokens)
    for new, old in enumerate(rows):
        assert_same_rows(few, new, cache, old)
    block = masked_like(random_ids(3, 4))
    of_view = MODEL.denoise(block[chosen], cache.view().select(chosen), None)
    torch.testing.assert_close(of_view, MODEL.denoise(block, cache.view(), None)[chosen], **CLOSE)


def test_each_row_has_its_own_t() -> None:
    """Guards per-row time: the official code averages t over the batch, ours must not."""
    block = masked_like(random_ids(1, 4)).expand(3, -1)
    view = MODEL.prefill(random_ids(1, 6).expand(3, -1)).view()
    t = torch.tensor([0.25, 1.0, 0.25])
    logits = MODEL.denoise(block, view, t)
    torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=1e-5)
    assert float((logits[0] - logits[1]).abs().max()) > 0.01
    for row in range(3):
        alone = MODEL.denoise(block[:1], view.select(torch.tensor([row])), t[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], alone, **CLOSE)
