"""What the prefix cache promises: equal to the last bit, within its memory, safe from its users."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny_models import fresh_model, prompts_of, random_ids
from tiny_options import options_of
from twotower import ContextCache, GenerateOptions, TwoTower, accelerate, generate
from twotower.engine import MODES, EngineOptions
from twotower.engine.prefix_cache import PrefixCache, boundary_after, last_boundary
from twotower.native.layout import LANES
from twotower.native.library import library

DENSE = "M*-M*-"


def model_with(chunk: int, **changes: object) -> TwoTower:
    model = fresh_model(**changes)
    model.prefix_chunk = chunk
    return model


MODEL = model_with(4)
PLENTY = 10**9
AR_ALONE = "ar", "on"  # refused: no row uses the denoiser
ONE_CONTEXT = 4800  # bytes: of a piece of 4 tokens and the states after it, and a little more


def tensors(cache: ContextCache) -> list[Tensor]:
    """All that the cache holds."""
    assert cache.last_hidden is not None
    return [cache.last_hidden, *(part for state in cache.layers if state for part in state)]


def assert_equal(ours: ContextCache, other: ContextCache) -> None:
    """To the last bit."""
    assert ours.lengths.tolist() == other.lengths.tolist()
    for mine, its in zip(tensors(ours), tensors(other), strict=True):
        assert torch.equal(mine, its)


def spoil(cache: ContextCache) -> None:
    """Go on with a cache, and then break all that it holds."""
    before = tensors(cache)
    MODEL.extend(cache, torch.tensor([[7, 8, 9]]))
    for part in (*before, *tensors(cache)):
        part.fill_(float("nan"))


@settings(max_examples=15)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 99), st.integers(1, 25), st.booleans()),
        min_size=1,
        max_size=9,
    ),
    max_contexts=st.sampled_from([0, 1, 2, 5, 20, 1000]),
)
def test_a_text_is_read_as_if_nothing_were_known(
    steps: list[tuple[int, int, int, bool]], max_contexts: int
) -> None:
    """Guards every answer of a server: a context that is not exactly the one after the shared
    beginning, that a later row has written into, or that outgrows its memory, stays unnoticed."""
    prefixes = PrefixCache(MODEL, max_contexts * ONE_CONTEXT)
    texts = prompts_of([20])
    for shared, which, own, is_for_later in steps:
        text = texts[which % len(texts)][:shared] + prompts_of([own], seed=which + own)[0]
        texts.append(text)
        if is_for_later:
            list(prefixes.remember(text))
        else:
            cache, known = prefixes.read(text)
            assert 0 <= known <= len(text)
            cold, nothing = PrefixCache(MODEL, 0).read(text)
            assert nothing == 0
            assert_equal(cache, cold)
            spoil(cache)
        assert 0 <= prefixes.stats.cache_bytes <= max_contexts * ONE_CONTEXT


def test_users_cannot_change_what_is_kept() -> None:
    """Guards texts that end at a boundary, whose cache is the kept context's very copy: broken in
    place by whoever got it first or later, it must be found whole."""
    text = random_ids(8).tolist()
    cold, _ = PrefixCache(MODEL, 0).read(text)
    prefixes = PrefixCache(MODEL, PLENTY)
    for known in (0, 8, 8):
        cache, found = prefixes.read(text)
        assert found == known
        assert_equal(cache, cold)
        spoil(cache)


@pytest.mark.parametrize("length", [256, 511, 520])
def test_long_texts_are_known_too(length: int) -> None:
    """Guards the longer pieces late in a text, whose boundaries must not depend on its length."""
    text = random_ids(length).tolist()
    prefixes = PrefixCache(MODEL, PLENTY)
    prefixes.read(text)
    longer = [*text, *prompts_of([130], seed=9)[0]]
    cache, known = prefixes.read(longer)
    assert known == last_boundary(length, 4) > 0
    assert_equal(cache, PrefixCache(MODEL, 0).read(longer)[0])


def test_native_reading_is_the_same_with_and_without() -> None:
    """Guards native passes, whose sums depend on how many tokens they read at once."""
    try:
        library()
    except OSError as error:
        pytest.skip(f"no native library: {error}")
    model = accelerate(fresh_model(hybrid_override_pattern=DENSE), "native")
    assert model.prefix_chunk == LANES
    prefixes = PrefixCache(model, PLENTY)
    text = random_ids(300).tolist()
    for shared in (0, 47, 128, 290):
        own = [*text[:shared], *prompts_of([60], seed=shared + 1)[0]]
        prefixes.read(text)
        cache, known = prefixes.read(own)
        assert known == last_boundary(shared, LANES)
        assert_equal(cache, PrefixCache(model, 0).read(own)[0])


def test_only_what_was_not_known_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the gain: a cache that answers right and reads everything again."""
    read: list[int] = []
    extend = TwoTower.extend

    def spy(model: TwoTower, cache: ContextCache, ids: Tensor) -> Tensor:
        read.append(ids.shape[1])
        return extend(model, cache, ids)

    monkeypatch.setattr(TwoTower, "extend", spy)
    prefixes, text = PrefixCache(MODEL, PLENTY), random_ids(22).tolist()
    assert prefixes.read(text)[1] == 0 and read == [4, 4, 4, 4, 4, 2]
    read.clear()
    assert prefixes.read(text)[1] == 20 and read == [2]
    read.clear()
    assert prefixes.read([*text[:11], 5, 6, 7])[1] == 8 and read == [4, 2]
    read.clear()
    assert prefixes.read(text[:20])[1] == 20 and read == []
    assert (prefixes.stats.cache_hits, prefixes.stats.cache_misses) == (3, 1)
    assert prefixes.stats.cache_saved_tokens == 48


def test_the_context_that_was_unused_for_longest_goes_first() -> None:
    """Guards against the loss of what everybody shares to what one has just asked."""
    shared = random_ids(4).tolist()
    prefixes = PrefixCache(MODEL, 4 * ONE_CONTEXT)
    for seed in range(12):
        _, known = prefixes.read([*shared, *prompts_of([5], seed=seed)[0]])
        assert known == (4 if seed else 0)
    assert prefixes.stats.cache_evictions == 9  # of 13 contexts


@pytest.mark.parametrize("chunk", [1, 2, 16, 64, 128, 256, 512])
def test_boundaries_are_those_of_every_text(chunk: int) -> None:
    """Guards texts of which one ends where another goes on: `last_boundary` must be one of those
    that `boundary_after` names."""
    boundaries, end = {0}, 0
    while end < 1500:
        end = boundary_after(end, chunk)
        boundaries.add(end)
        assert boundary_after(end - 1, chunk) == end
    for length in range(1500):
        assert last_boundary(length, chunk) == max(b for b in boundaries if b <= length)


@pytest.mark.parametrize(
    ("mode", "overlap"),
    [(mode, overlap) for mode in MODES for overlap in ("off", "on") if (mode, overlap) != AR_ALONE],
)
def test_rows_that_begin_alike_write_what_they_write_alone(mode: str, overlap: str) -> None:
    """Guards the way from the cache into a batch: lengths, states and outputs of rows that took
    much, little or nothing from it."""
    beginning = random_ids(33, seed=5).tolist()
    prompts = [beginning[:n] + prompts_of([3], seed=n)[0] for n in (33, 20, 7, 33, 1)]
    o = options_of({"steps_per_block": 4}, {"mode": mode, "max_new_tokens": 6, "temperature": 0.8})
    engine = EngineOptions(batch_size=2, overlap=overlap, prefix_cache_bytes=PLENTY)  # type: ignore[arg-type]
    done = generate(MODEL, prompts, o, engine=engine)
    alone = [generate(MODEL, [prompt], o)[0] for prompt in prompts]
    assert [row.tokens for row in done] == [row.tokens for row in alone]
    assert done[3].cached_tokens == (32 if mode == "mock-ar" else 36)  # which reads all but one
    assert done[2].cached_tokens == 4
    assert [row.cached_tokens for row in alone] == [0] * 5


def test_a_known_prompt_costs_no_pass() -> None:
    """Guards the count: context forwards are those that ran."""
    prompt = random_ids(8).tolist()
    o = GenerateOptions(mode="ar", max_new_tokens=1)
    engine = EngineOptions(batch_size=1, prefix_cache_bytes=PLENTY)
    first, second = generate(MODEL, [prompt, prompt], o, engine=engine)
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert (first.context_forwards, second.context_forwards) == (1, 0)
    assert first.tokens == second.tokens


def test_the_bound_is_checked() -> None:
    with pytest.raises(ValueError, match="prefix_cache_bytes=-1 must be at least 0"):
        EngineOptions(prefix_cache_bytes=-1)
