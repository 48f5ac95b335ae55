"""Keys and values in half precision: rounded once, where a pass makes them; read as they are."""

import copy

import pytest
import torch
from torch import Tensor, nn

from property.test_draft_trees import FREE
from property.test_native_llama import model_of, tokens
from tiny_models import fresh_model, masked_like, prompts_of, random_ids, row_state
from tiny_options import options_of
from twotower import ContextCache, TwoTower, accelerate, generate
from twotower.engine import EngineOptions
from twotower.layers.attention import KV
from twotower.model.delta import apply_delta, delta_since
from twotower.model.draft_tree import DraftTree, along_paths
from twotower.model.rows import append_rows, keep_rows
from twotower.native import library

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES: tuple[dict[str, object], ...] = (
    {"hybrid_override_pattern": "*-*"},
    {"hybrid_override_pattern": "*M*", "head_dim": 12, "num_attention_heads": 6},
    {"hybrid_override_pattern": "*-", "head_dim": 3, "num_key_value_heads": 1},
    {"hybrid_override_pattern": "*-", "head_dim": 32, "num_key_value_heads": 4},
)
ATTENTION = {"hybrid_override_pattern": "*-*"}


def keys_of(cache: ContextCache) -> list[Tensor]:
    """Keys and values of each layer that has them."""
    return [part for state in cache.layers if isinstance(state, KV) for part in state]


def without_own_keys(model: TwoTower) -> TwoTower:
    """The model, its keys and values 0, which no rounding changes."""
    for module in model.modules():
        for name in ("k_proj", "v_proj"):
            if isinstance(linear := getattr(module, name, None), nn.Linear):
                for part in linear.parameters():
                    part.data.zero_()
    return model


def filled(model: TwoTower, lengths: list[int], values: ContextCache | None) -> ContextCache:
    """A cache of the model with random keys of rows, or with those of another cache."""
    cache, room = model.empty_cache(len(lengths)), max(lengths) + 70
    generator = torch.Generator().manual_seed(5)
    parts = iter(()) if values is None else iter(values.buffers)
    for index, state in enumerate(cache.buffers):
        own = next(parts, None)
        if isinstance(own, KV):
            cache.buffers[index] = KV(*(part.to(model.kv_dtype) for part in own))
        elif isinstance(state, KV):
            shape = len(lengths), room, *state.k.shape[2:]
            random = (torch.randn(shape, generator=generator) for _ in range(2))
            cache.buffers[index] = KV(*(part.to(model.kv_dtype) for part in random))
    cache.lengths = torch.tensor(lengths)
    return cache


def both(model: TwoTower, dtype: str) -> tuple[TwoTower, TwoTower]:
    """Native passes that keep keys and values in half precision, and in float32."""
    return accelerate(model, "native", kv_cache_dtype=dtype), accelerate(model, "native")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 4, 7, 16, 70])
def test_keys_are_rounded_once(dtype: str, shape: dict[str, object], length: int) -> None:
    """Guards what is kept: cut off instead of rounded, written as if it were wider, or infinite
    where a half has no such number, it would be other keys; NaN would be a number.
    """
    model = fresh_model(**shape)
    k_proj = model.context_tower.layers[0].mixer.k_proj.weight.data
    k_proj[0] *= 1e-5 / k_proj[0].abs().max()  # subnormal in float16
    k_proj[1] *= 1e6
    k_proj[2, 0] = float("nan")
    half, wide = both(model, dtype)
    assert (half.kv_dtype, half.dtype) == (DTYPES[dtype], torch.float32)
    ids = random_ids(2, length)
    for own, known in zip(keys_of(half.prefill(ids))[:2], keys_of(wide.prefill(ids)), strict=False):
        most = torch.finfo(DTYPES[dtype]).max
        expected = known.clamp(-most, most).to(DTYPES[dtype])
        torch.testing.assert_close(own, expected, rtol=0, atol=0, equal_nan=True)
        assert not bool(own.isinf().any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_halves_are_read_as_they_are(dtype: str, shape: dict[str, object]) -> None:
    """Guards every way in which attention reads: over the same numbers in float32, which both types
    hold, a pass of any number of tokens and rows gives the same bits.
    """
    half, wide = both(without_own_keys(fresh_model(**shape)), dtype)
    for lengths in ([1], [63], [64], [131], [5, 130, 64]):
        ours = filled(half, lengths, None)
        theirs = filled(wide, lengths, ours)
        for length in (1, 2, 5, 8, 16, 17, 40, 70):
            ids = random_ids(len(lengths), length, seed=length)
            found, expected = half.verify(ours, ids).hidden, wide.verify(theirs, ids).hidden
            assert torch.equal(found, expected), (lengths, length)
            block = masked_like(ids)
            found, expected = (
                model.denoise(block, cache.view(), None)
                for model, cache in ((half, ours), (wide, theirs))
            )
            assert torch.equal(found, expected), (lengths, length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen3, window"])
def test_windows_and_branches_read_halves(dtype: str, name: str) -> None:
    """Guards the copies that attention makes of blocks where a draft branches or the past ends."""
    half, wide = both(without_own_keys(copy.deepcopy(model_of(name))), dtype)
    lengths = [60, 7, 64]
    ours = filled(half, lengths, None)
    theirs, drafts = filled(wide, lengths, ours), tokens(3, 12, seed=2)
    trees = [DraftTree([[-1, 0, 0, 1, 2, 2, 3, 6, 6, 4, 9, 9]] * 3), None]
    for tree in trees:
        found, expected = (
            model.verify(cache, drafts, tree=tree).hidden
            for model, cache in ((half, ours), (wide, theirs))
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_a_text_is_the_same_however_it_is_cut(dtype: str, name: str) -> None:
    """Guards lossless speculation: keys that a pass reads before they are rounded are others than
    those that a later pass finds; so are those of a branch that moved as if they were wider.
    """
    model = accelerate(copy.deepcopy(model_of(name)), "native", "int8", dtype)  # type: ignore[arg-type]
    ids = tokens(1, 90, seed=3)
    whole = model.prefill(ids)
    for size in (1, 3, 16, 64):
        cut = model.prefill(ids, chunk_size=size)
        for own, other in zip(row_state(cut, 0), row_state(whole, 0), strict=True):
            assert torch.equal(own, other), size
    cache = model.prefill(ids[:, :70])
    path = [0, 3, 5, 8]
    drafts = tokens(1, 9, seed=4)
    drafts[0, path] = ids[0, 70:74]
    output = model.verify(cache, drafts, tree=DraftTree([[-1, 0, 1, 0, 2, 3, 4, 1, 5]]))
    cache.commit(along_paths(output, [path]), torch.tensor([4]))
    for own, other in zip(keys_of(cache), keys_of(model.prefill(ids[:, :74])), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", [{}, {"batch_size": 3}, {"prefix_cache_bytes": 10**8}])
def test_speculation_writes_what_ar_writes(
    dtype: str, engine: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the engine's parts that copy, join and keep caches: one that made them wider, or took
    them for wider, would write another text or fail.
    """
    fresh = fresh_model(hybrid_override_pattern="M*-*", vocab_size=64)
    model = accelerate(fresh, "native", "int8", dtype)  # type: ignore[arg-type]
    monkeypatch.setattr(type(model.backend), "pass_costs", FREE)  # every cycle drafts
    prompts = prompts_of([40, 7, 70, 40])
    texts = [
        [
            found.tokens
            for found in generate(
                model,
                prompts,
                options_of({}, {"mode": mode, "max_new_tokens": 40}),
                engine=EngineOptions(**engine),
            )
        ]
        for mode in ("ar", "speculative")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_stays_in_half_precision(dtype: str) -> None:
    """Guards memory: a part that is grown, joined or sent in float32 takes twice what was asked
    for, and an estimate in float32 admits half as many clients.
    """
    half, wide = both(fresh_model(**ATTENTION), dtype)
    assert 2 * half.token_bytes == wide.token_bytes
    cache, other = half.prefill(random_ids(2, 100)), half.prefill(random_ids(1, 9))
    append_rows(cache, other)
    assert keep_rows(cache, [0, 2]) == [0, 2]
    half.extend(cache, random_ids(2, 90))
    follower = half.empty_cache(2)
    delta = delta_since(cache, torch.tensor([0, 0])).to("cpu")
    apply_delta(follower, delta)
    for found in (cache.layers, delta.states, follower.layers):
        kept = [state for state in found if isinstance(state, KV)]
        assert {part.dtype for state in kept for part in state} == {DTYPES[dtype]}
    used = sum(part.nbytes for part in keys_of(half.prefill(random_ids(1, 50))))
    assert used == 50 * half.token_bytes
