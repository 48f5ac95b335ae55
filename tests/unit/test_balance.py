"""The balance of experts: its step by hand, where it leads, which routers it leaves alone."""

import json
from pathlib import Path

import pytest
import torch

from tiny_models import fresh_model, random_ids, random_model, tiny_moe
from tiny_qwen3_moe import tiny_config as tiny_qwen3_moe
from tiny_training import make_shard, tiny_options
from twotower.families import config_to_dict
from twotower.layers.moe import Router
from twotower.train.loop import train_steps
from twotower.train.models import tie_towers
from twotower.train.optimizer import ExpertBalance


def skewed_router() -> Router:
    """Of 8 experts the first two are nearly always chosen."""
    router = Router(16, tiny_moe(n_routed_experts=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(0.1 * torch.randn(router.weight.shape, generator=generator))
        router.e_score_correction_bias[:2] = 0.5
    return router


X = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))


def test_one_step_by_hand() -> None:
    router = skewed_router()
    before = router.e_score_correction_bias.clone()
    balance = ExpertBalance(router, 0.01)
    chosen, _ = router(X)
    (counts,) = balance.counts.values()
    assert counts.tolist() == torch.bincount(chosen.flatten(), minlength=8).tolist()
    balance.update()
    expected = torch.tensor([-0.01] * 2 + [0.01] * 6)  # 100 tokens each would be even
    torch.testing.assert_close(router.e_score_correction_bias - before, expected)
    balance.reset()
    assert counts.eq(0).all()


def test_steps_lead_to_even_loads() -> None:
    """Silent failure: a sign the wrong way round, which starves experts all the faster."""
    router = skewed_router()
    balance = ExpertBalance(router, 0.005)
    for _ in range(200):
        balance.reset()
        router(X)
        balance.update()
    (counts,) = balance.counts.values()
    assert counts.sum() == 800 and counts.min() > 70 and counts.max() < 130


def test_frozen_routers_and_rate_zero_count_nothing() -> None:
    """Silent failure: training the denoiser moves the frozen context tower's choice of experts."""
    model = fresh_model()
    model.context_tower.requires_grad_(False)
    before = {n: b.clone() for n, b in model.named_buffers()}
    balance = ExpertBalance(model, 0.1)
    model.training_logits(random_ids(2, 8), random_ids(2, 8), None, 4)
    balance.update()
    moved = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {n for n in before if n.startswith("denoiser_tower.")} != set()
    assert ExpertBalance(model, 0.0).counts == {}


@pytest.mark.parametrize("shared", [True, False], ids=["shared buffer", "copies"])
def test_tied_towers_count_together(shared: bool) -> None:
    """Silent failure: one weight with two biases, of which a file keeps the last."""
    model = fresh_model()
    tie_towers(model)
    assert model.denoiser_tower is not None
    own = model.denoiser_tower.layers[2].mixer.gate
    context = model.context_tower.layers[2].mixer.gate
    assert own.weight is context.weight
    if not shared:  # as another device would have it
        own.e_score_correction_bias = own.e_score_correction_bias.clone()
    before = context.e_score_correction_bias.clone()
    balance = ExpertBalance(model, 0.1)
    model.training_logits(random_ids(2, 8), random_ids(2, 8), None, 4)
    (counts,) = balance.counts.values()
    assert counts.sum() == 2 * (16 + 16)  # experts per token, tokens of either tower
    balance.update()
    assert torch.equal(own.e_score_correction_bias, context.e_score_correction_bias)
    expected = before + 0.1 * (counts.mean() - counts).sign()
    torch.testing.assert_close(own.e_score_correction_bias, expected)


def test_softmax_routers_are_left_alone(tmp_path: Path) -> None:
    """Silent failure: a rate that somebody gives does nothing, since such routers have no bias."""
    model = random_model(tiny_qwen3_moe())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    balance = ExpertBalance(model, 0.1)
    model.training_logits(random_ids(2, 8), random_ids(2, 8), None, 4)
    balance.update()
    assert balance.counts == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    data = make_shard(tmp_path / "shard")
    config = config_to_dict(tiny_qwen3_moe(block_size=4))
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {"preset": None, "config": str(tmp_path / "config.json"), "load_balance_rate": 0.01}
    with pytest.raises(ValueError, match="no effect on a model whose routers are a softmax"):
        list(train_steps(tiny_options(data, tmp_path / "run", **given)))
