"""Every configuration keeps the promises: one state by any route, training equals generation."""

import json
from pathlib import Path

import pytest
import torch

from tiny_models import fresh_model, masked_like, prompts_of, random_ids, tiny_config, tiny_model
from twotower import GenerateOptions, TwoTower, generate
from twotower.checkpoint import load_checkpoint, save_two_towers
from twotower.engine import MODES
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "fp32 residual": {"residual_in_fp32": True},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "use_bias": True, "mlp_bias": True,
               "hybrid_override_pattern": "M*-M"},
    "no conv bias": {"use_conv_bias": False},
    "expert groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2,
                      "num_experts_per_tok": 3, "norm_topk_prob": False},
    "scaled experts": {"routed_scaling_factor": 2.5, "num_experts_per_tok": 1},
    "one group": {"n_groups": 1, "num_key_value_heads": 1},
    "a group per head": {"n_groups": 4, "num_key_value_heads": 4},
    "conv of 1": {"conv_kernel": 1},
    "conv of 6": {"conv_kernel": 6},
    "mamba alone": {"hybrid_override_pattern": "MM"},
    "attention alone": {"hybrid_override_pattern": "**"},
    "bidirectional mamba": {"bidirectional_mamba": True},
    "no state": {"hybrid_override_pattern": "-E"},
    "heads wider than the model": {"head_dim": 12, "mamba_head_dim": 16},
}  # fmt: skip
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# bfloat16 has 8 bits: through several layers, logits of size 5 move by some hundredths
CLOSE = {
    torch.float32: {"rtol": 0.0, "atol": 3e-4},
    torch.bfloat16: {"rtol": 0.1, "atol": 0.5},
}


@every_variant
@every_dtype
def test_one_state_by_any_route(changes: dict[str, object], dtype: torch.dtype) -> None:
    """Guards rarely used switches: a bias or a group that one path forgets (prefill, extension,
    single token, batch of unequal rows) is invisible in the default configuration."""
    model = tiny_model(dtype=dtype, **changes)
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = model.context_logits(ids)
    cache = model.prefill(ids, torch.tensor([6, 3]), chunk_size=4)
    torch.testing.assert_close(model.next_logits(cache)[0], expected[0, 5], **CLOSE[dtype])
    torch.testing.assert_close(model.next_logits(cache)[1], expected[1, 2], **CLOSE[dtype])
    model.extend(cache, torch.stack([ids[0, 6:8], ids[1, 3:5]]))
    model.extend(cache, torch.stack([ids[0, 8:9], ids[1, 5:6]]))
    assert cache.lengths.tolist() == [9, 6]
    torch.testing.assert_close(model.next_logits(cache)[0], expected[0, 8], **CLOSE[dtype])
    torch.testing.assert_close(model.next_logits(cache)[1], expected[1, 5], **CLOSE[dtype])


@every_variant
@every_dtype
def test_training_equals_generation(changes: dict[str, object], dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype, **changes)
    clean = random_ids(2, 8)
    noisy, t = masked_like(clean), torch.tensor([0.5, 1.0])
    with torch.no_grad():
        at_once = model.training_logits(clean, noisy, t, 4)
    alone = model.denoise(noisy[:, 4:], model.prefill(clean[:, :4]).view(), t)
    assert at_once.dtype == alone.dtype == torch.float32
    torch.testing.assert_close(at_once[:, 4:], alone, **CLOSE[dtype])


@every_variant
def test_bfloat16_is_the_same_model(changes: dict[str, object]) -> None:
    """Guards against a wrong cast: bfloat16 must be float32 with coarser numbers."""
    full, half = (tiny_model(dtype=d, **changes) for d in (torch.float32, torch.bfloat16))
    ids = random_ids(2, 8)
    with torch.no_grad():
        a, b = full.context_logits(ids), half.context_logits(ids)
    assert b.dtype == torch.float32
    error = float((a - b).square().mean().sqrt() / a.square().mean().sqrt())
    assert error < 0.1, error


@pytest.mark.parametrize("mode", MODES)
@every_dtype
@pytest.mark.parametrize("name", ["plain", "fp32 residual", "mamba alone", "attention alone"])
def test_every_mode_runs(name: str, dtype: torch.dtype, mode: str) -> None:
    model = tiny_model(dtype=dtype, **VARIANTS[name])
    o = GenerateOptions(mode=mode, max_new_tokens=6, temperature=0.5)  # type: ignore[arg-type]
    found = generate(model, prompts_of([1, 6]), o)
    assert [len(row.tokens) for row in found] == [6, 6]
    if mode not in (
        "ar",
        "speculative",
        "mock-ar",
    ):  # those follow the raw logits, as the official code does
        assert all(token != model.config.mask_token_id for row in found for token in row.tokens)


@every_dtype
@pytest.mark.parametrize("name", ["plain", "fp32 residual"])
def test_dtypes_of_states_and_logits(name: str, dtype: torch.dtype) -> None:
    """Guards the SSM state's precision: in bfloat16 it would forget small additions."""
    model = tiny_model(dtype=dtype, **VARIANTS[name])
    cache = model.prefill(random_ids(1, 5))
    kv, mamba = cache.layers[1], cache.layers[0]
    assert isinstance(kv, KV) and isinstance(mamba, MambaState)
    assert (kv.k.dtype, kv.v.dtype, mamba.conv.dtype) == (dtype, dtype, dtype)
    assert mamba.ssm.dtype == torch.float32
    block = masked_like(random_ids(1, 4))
    assert model.denoise(block, cache.view(), torch.tensor([0.5])).dtype == torch.float32
    assert model.next_logits(cache).dtype == torch.float32


@pytest.mark.parametrize("keeps", [True, False])
def test_the_fp32_residual_keeps_small_additions(keeps: bool) -> None:
    """Guards an option that is accepted and ignored: 64 layers add 1/512 each to one channel of
    ones, which bfloat16 rounds away one by one and float32 sums up to 1/8, in both towers."""
    model = fresh_model(
        dtype=torch.bfloat16,
        hybrid_override_pattern="-" * 64,
        mlp_bias=True,
        residual_in_fp32=keeps,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_one = name.endswith(("embeddings.weight", "norm.weight", "norm_f.weight"))
            parameter.fill_(1.0 if is_one else 0.0)
            if name.endswith(("down_proj.bias", "lm_head.weight")):
                parameter[..., 0] = 2.0**-9 if name.endswith("bias") else 1.0
        ids = random_ids(1, 2)
        found = [model.context_logits(ids), model.denoise(ids, model.empty_cache(1).view(), None)]
    sum_of_channel = 1.125 if keeps else 1.0
    expected = sum_of_channel / ((sum_of_channel**2 + 15) / 16) ** 0.5
    for logits in found:
        assert abs(float(logits[0, 0, 0]) - expected) < 0.01


def test_tied_heads_are_the_embeddings() -> None:
    """Guards tying: two names, one tensor per tower, never shared between the towers."""
    model = fresh_model(tie_word_embeddings=True)
    assert model.denoiser_tower is not None
    assert model.context_lm_head.weight is model.context_tower.embeddings.weight
    assert model.lm_head.weight is model.denoiser_tower.embeddings.weight
    assert model.lm_head.weight is not model.context_lm_head.weight
    free = fresh_model()
    assert free.context_lm_head.weight is not free.context_tower.embeddings.weight


def test_the_context_tower_alone() -> None:
    """Guards AR decoding with half the memory: no denoiser, the same text, a clear refusal."""
    both = tiny_model()
    half = TwoTower(tiny_config(), towers="context").eval()
    half.load_state_dict(
        {name: v for name, v in both.state_dict().items() if name.startswith("context_")}
    )
    o = GenerateOptions(mode="ar", max_new_tokens=8, ignore_eos=True)
    assert generate(half, [[5, 6]], o) == generate(both, [[5, 6]], o)
    assert half.denoiser_device == half.context_device
    with pytest.raises(ValueError, match="needs a denoiser tower"):
        generate(half, [[5, 6]], GenerateOptions(mode="diffusion"))
    with pytest.raises(ValueError, match="no denoiser tower"):
        half.denoise(random_ids(1, 4), half.empty_cache(1).view(), None)


def test_bidirectional_mamba_is_the_mean_of_two_scans() -> None:
    """Guards the reversed scan: its tokens in order again, from zeros, in the denoiser alone."""
    model = fresh_model(hybrid_override_pattern="M", bidirectional_mamba=True)
    tower = model.denoiser_tower
    assert tower is not None
    view = model.prefill(random_ids(1, 5)).view()
    block = masked_like(random_ids(1, 4, seed=1))
    seed = view.layers[0]
    assert isinstance(seed, MambaState)
    with torch.no_grad():
        (layer,) = tower.each_layer()
        h = tower.embed(block)
        _, u = layer.pre_norm(h)
        forward, _ = layer.mixer(u, MambaState(seed.conv[:, 0], seed.ssm[:, 0]), None, 4)
        backward = [layer.mixer(u[:, i:].flip(1), None, None, 4 - i)[0][:, -1] for i in range(4)]
        mean = (forward + torch.stack(backward, dim=1)) / 2
        expected = model.lm_head(tower.finish(h, (mean, None)))
    found = model.denoise(block, view, None)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)
    plain = fresh_model(hybrid_override_pattern="M")
    assert (plain.denoise(block, view, None) - found).abs().max() > 0.1
    ids = random_ids(1, 6)
    with torch.no_grad():
        assert torch.equal(model.context_logits(ids), plain.context_logits(ids))


def test_bidirectional_mamba_survives_a_file(tmp_path: Path) -> None:
    """Silent failure: a model is decoded by another scan than it was trained with."""
    model = fresh_model(bidirectional_mamba=True)
    save_two_towers(model, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model")
    block = masked_like(random_ids(1, 4))
    ids = random_ids(1, 5)
    one, two = (m.denoise(block, m.prefill(ids).view(), None) for m in (model, loaded))
    assert torch.equal(one, two)
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    assert values.pop("bidirectional_mamba") is True
    file.write_text(json.dumps(values))  # as every released one
    assert not load_checkpoint(tmp_path / "model").config.bidirectional_mamba


@every_dtype
def test_towers_of_different_dtypes(dtype: torch.dtype) -> None:
    """Guards split placement: one tower's state is cast where the other reads it."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    model = fresh_model(dtype=dtype)
    for name, module in model.named_children():
        if not name.startswith("context_"):
            module.to(other)
    clean = random_ids(2, 8)
    noisy, t = masked_like(clean), torch.tensor([0.5, 1.0])
    exact = tiny_model().denoise(noisy[:, 4:], tiny_model().prefill(clean[:, :4]).view(), t)
    ours = model.denoise(noisy[:, 4:], model.prefill(clean[:, :4]).view(), t)
    error = float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert error < 0.1, error
    for mode in MODES:
        o = GenerateOptions(mode=mode, max_new_tokens=5)
        assert len(generate(model, [[5, 6]], o)[0].tokens) == 5


def test_autocast_training_is_the_same_model() -> None:
    """Guards mixed-precision training: float32 weights under bfloat16 autocast, with gradients."""
    model = fresh_model()
    clean = random_ids(2, 8)
    noisy, t = masked_like(clean), torch.tensor([0.5, 1.0])
    exact = model.training_logits(clean, noisy, t, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model.training_logits(clean, noisy, t, 4)
    assert ours.dtype == torch.float32
    error = float((ours - exact).detach().square().mean().sqrt() / exact.detach().std())
    assert 0 < error < 0.1, error
    a, b = (
        torch.autograd.grad(x.square().mean(), [model.lm_head.weight])[0] for x in (ours, exact)
    )
    assert float((a - b).norm() / b.norm()) < 0.1
