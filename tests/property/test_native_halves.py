"""Native passes over weights in half precision: each number is that of the same weights in float32.

A bit that differs is an activation that was rounded, or a weight that was.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tiny_models import fresh_model, masked_like, random_ids, random_model
from tiny_options import options_of
from twotower import TwoTower, accelerate, generate
from twotower.config import DraftSpec
from twotower.families import config_from_dict
from twotower.layers.attention import KV
from twotower.model.thin import thin_config
from twotower.native import layout, library
from twotower.native.buffers import past_states
from twotower.native.weights import native_linear, native_table, native_tower

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

HALVES = (torch.bfloat16, torch.float16)
QWEN: dict[str, object] = {
    "model_type": "qwen3_moe", "vocab_size": 41, "hidden_size": 37, "intermediate_size": 45,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 29, "block_size": 16,
    "tie_word_embeddings": True, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, Callable[[], TwoTower]] = {
    "nemotron_h": lambda: fresh_model(hybrid_override_pattern="M*-M-", block_size=16),
    "biases": lambda: fresh_model(
        hybrid_override_pattern="M*-", attention_bias=True, use_bias=True, mlp_bias=True
    ),
    "odd widths": lambda: fresh_model(
        hybrid_override_pattern="M*-", hidden_size=19, vocab_size=43, intermediate_size=21
    ),
    "experts": lambda: fresh_model(hybrid_override_pattern="ME*E", moe_latent_size=12),
    "gated experts, rotary, one mask": lambda: random_model(config_from_dict(QWEN)),
    "thin denoiser": lambda: _with_thin_denoiser(fresh_model(hybrid_override_pattern="M*-*-")),
}


def _with_thin_denoiser(model: TwoTower) -> TwoTower:
    spec = DraftSpec(bigram_rank=4, vocab_size=11)
    found = random_model(thin_config(model.config, [3, 4], 8, spec))
    assert found.draft_ids is not None
    found.draft_ids.copy_(torch.arange(11) * 3)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_passes_are_timed_over_states_in_float32(name: str) -> None:
    """Guards memory: the first draft times passes, and a cache in the weights' half precision, half
    as large as what they write, let them write beyond it. Keys tell what they are; Mamba states,
    and layers that differ, are refused.
    """
    model = accelerate(MODELS[name]().bfloat16(), "native")
    assert model.pass_costs.tokens[1] == 1
    assert {part.dtype for state in model.empty_cache(1).layers for part in state or ()} == {
        torch.float32
    }
    layers = list(MODELS[name]().bfloat16().empty_cache(1).layers)
    index = next(i for i, state in enumerate(layers) if isinstance(state, KV))
    assert past_states(layers[index : index + 1], 1).kv_dtype == torch.bfloat16
    layers[index] = KV(*(part.double() for part in layers[index] or ()))
    with pytest.raises(TypeError, match="native passes keep such a state in"):
        past_states(layers, 1)
    mixed = [KV(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8).half())]
    with pytest.raises(TypeError, match=r"in torch\.float32, and it is torch\.float16"):
        past_states(mixed, 1)


def pair(name: str, dtype: torch.dtype) -> tuple[TwoTower, TwoTower]:
    """A model in half precision, and the same numbers in float32."""
    half = MODELS[name]().to(dtype)
    return accelerate(half, "native"), accelerate(copy.deepcopy(half).float(), "native")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_passes_have_the_bits_of_float32(name: str, dtype: torch.dtype) -> None:
    """Guards every kind of weight, also those that Python multiplies: times, bigrams."""
    half, wide = pair(name, dtype)
    assert half.dtype == torch.float32

    def numbers(model: TwoTower, length: int) -> list[Tensor]:
        ids, block = random_ids(1, length), masked_like(random_ids(1, length, seed=1))
        cache = model.prefill(ids)
        found = [model.extend(cache, block[:, :1]), model.next_logits(cache)]
        found.append(model.best_after(found[0], (5,)))  # type: ignore[arg-type]  # native has it
        for t in (None, torch.tensor([0.75]), torch.tensor([0.123])):
            found.append(model.denoise(block, cache.view(), t))
        cache.commit(model.verify(cache, ids), torch.tensor([length - length // 3]))
        return [*found, model.next_logits(cache)]

    for length in (1, 2, 6, 11, 24, 81):
        for ours, theirs in zip(numbers(half, length), numbers(wide, length), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), length


@pytest.mark.parametrize("mode", ["ar", "speculative", "diffusion"])
@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_float32(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards decoding as a whole: a cache in half precision would round what passes leave."""
    half, wide = pair(name, torch.bfloat16)
    monkeypatch.setattr(type(half.backend), "pass_costs", wide.pass_costs)  # who drafts
    o = options_of({}, {"mode": mode, "max_new_tokens": 30})
    prompts = [random_ids(length, seed=length).tolist() for length in (1, 7, 40)]
    found, expected = (generate(model, prompts, o) for model in (half, wide))
    assert [(row.tokens, row.nfe) for row in found] == [(row.tokens, row.nfe) for row in expected]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [5, 16, 203])
def test_products_of_any_weights(dtype: torch.dtype, width: int) -> None:
    """Guards the ends of a format: subnormal numbers would be lost or scaled, infinity would be a
    large number, and the last numbers of a row would be those of the next.
    """
    weight = torch.randn(531, width).to(dtype)
    weight[100:140] *= torch.finfo(dtype).tiny
    weight[200, :2], weight[201, 1] = torch.finfo(dtype).max, float("inf")
    weight[202, 0] = float("nan")
    subnormal = torch.arange(width) % 61 * torch.finfo(dtype).smallest_normal / 64
    weight[300] = subnormal.to(dtype)
    assert bool((weight[300] > 0).any())
    half, wide = native_linear(weight), native_linear(weight.float())
    for length in (1, 2, 5, 9, 17, 40, 70):
        x = torch.randn(length, width)
        found, expected = half(x), wide(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert bool(found[:, 202].isnan().all()) and not bool(found[:, 201].isfinite().any())
        assert bool((found[:, 300] != 0).all())


@pytest.mark.parametrize("other", ["context", "denoiser"])
def test_towers_may_differ(other: str) -> None:
    """Guards a denoiser that was trained in float32 beside a backbone in half precision."""
    half = MODELS["nemotron_h"]().to(torch.bfloat16)
    wide = accelerate(copy.deepcopy(half).float(), "native")
    for name, part in half.named_children():
        if name.startswith("context") == (other == "context"):
            part.float()
    assert len({weight.dtype for weight in half.parameters()}) == 2
    mixed = accelerate(half, "native")
    block = masked_like(random_ids(2, 9))
    caches = [model.prefill(block) for model in (mixed, wide)]
    for t in (None, torch.tensor([0.5, 1.0])):
        found, expected = (
            model.denoise(block, cache.view(), t)
            for model, cache in zip((mixed, wide), caches, strict=True)
        )
        assert torch.equal(found, expected)
    assert torch.equal(mixed.next_logits(caches[0]), wide.next_logits(caches[1]))


def test_matrices_are_read_where_they_lie() -> None:
    """Guards memory: a widened copy would take twice what the model does."""
    model = MODELS["experts"]().to(torch.bfloat16)
    table = native_table(model.context_tower.embeddings.weight, None)
    tower = native_tower(model.context_tower, table, "context_tower", True, None, {})
    assert tower is not None
    for index, layer in enumerate(tower.layers):
        names = layout.weight_names(layer.kind)
        weights = (layout.Weight * len(names)).from_address(layer.weights)
        own = dict(model.context_tower.layers[index].named_parameters())
        for name, weight in zip(names, weights, strict=True):
            is_read = name in own and layout.is_matrix(name)
            assert weight.half == (own[name].data_ptr() if is_read else None), name
            assert not is_read or weight.full is None, name
