"""The router's choice and weights by hand, and the sum of the chosen experts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_models import tiny_moe
from twotower.layers.moe import Experts, MoE, Router
from twotower.specs import MoESpec

PARTS = ("gate", "up", "down")


def logit(p: float) -> float:
    return float(torch.logit(torch.tensor(p, dtype=torch.float64)))


def router(scores: list[float], bias: list[float] | None = None, **changes: object) -> Router:
    """A router that gives x = 1 exactly these sigmoid scores."""
    values = {"hidden_size": 1, "n_routed_experts": len(scores)} | changes
    made = Router(int(str(values.get("hidden_size", 16))), tiny_moe(**values)).requires_grad_(False)
    made.weight.copy_(torch.tensor([[logit(score)] for score in scores]))
    if bias is not None:
        made.e_score_correction_bias.copy_(torch.tensor(bias))
    return made


def choice(made: Router) -> dict[int, float]:
    """Chosen experts and their weights for x = 1."""
    chosen, weights = made(torch.ones(1, 1))
    assert chosen.dtype == torch.int64
    assert weights.dtype == torch.float32
    return {int(e): round(float(w), 5) for e, w in zip(chosen[0], weights[0], strict=True)}


def test_the_bias_steers_the_choice_and_not_the_weight() -> None:
    """Guards the correction bias: weights with it would scale every expert's output wrongly."""
    scores = [0.5, 0.9, 0.3, 0.8]
    plain = choice(router(scores, norm_topk_prob=False))
    assert plain == {1: 0.9, 3: 0.8}
    steered = choice(router(scores, [0.0, 0.0, 1.0, 0.0], norm_topk_prob=False))
    assert steered == {2: 0.3, 1: 0.9}


def test_weights_are_normed_then_scaled() -> None:
    found = choice(router([0.5, 0.9, 0.3, 0.6], norm_topk_prob=True, routed_scaling_factor=2.5))
    assert found == {1: round(2.5 * 0.9 / 1.5, 5), 3: round(2.5 * 0.6 / 1.5, 5)}
    found = choice(router([0.5, 0.9, 0.3, 0.6], norm_topk_prob=False, routed_scaling_factor=2.5))
    assert found == {1: 2.25, 3: 1.5}


def test_groups_compete_by_the_sum_of_their_two_best() -> None:
    """Guards the choice of groups: the best single expert (0.95) sits in a group that loses."""
    scores = [0.95, 0.1, 0.05, 0.7, 0.6, 0.5, 0.2, 0.3, 0.3]  # three groups of three
    changes = {"n_group": 3, "num_experts_per_tok": 2, "norm_topk_prob": False}
    assert choice(router(scores, topk_group=1, **changes)) == {3: 0.7, 4: 0.6}
    assert choice(router(scores, topk_group=2, **changes)) == {0: 0.95, 3: 0.7}


def test_groups_count_the_biased_scores() -> None:
    scores, bias = [0.9, 0.8, 0.3, 0.2], [0.0, 0.0, 1.0, 1.0]
    changes = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "norm_topk_prob": False}
    assert choice(router(scores, bias, **changes)) == {2: 0.3, 3: 0.2}


def test_lost_groups_score_zero_and_not_minus_infinity() -> None:
    """Guards a fact of the released model: an expert of a lost group (0) beats one of a kept group
    whose corrected score is negative."""
    scores = [0.9, 0.2, 0.3, 0.4]
    changes = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "norm_topk_prob": False}
    bias = [0.2, -0.5, 0.0, 0.0]  # corrected: 1.1 -0.3 (sum 0.8) | 0.3 0.4 (sum 0.7)
    found = choice(router(scores, bias, **changes))
    assert 0 in found and 1 not in found


def test_the_choice_is_made_in_float64() -> None:
    """Guards borderline choices: two scores whose difference float32 cannot see."""
    made = Router(2, tiny_moe(n_routed_experts=2, num_experts_per_tok=1))
    weight = torch.tensor([[20.0, 0.0], [20.0, 2.0**-8]])
    made.weight.data.copy_(weight)
    x = torch.ones(1, 2)
    in_float64 = torch.sigmoid(x.double() @ weight.double().T)
    in_float32 = torch.sigmoid(x @ weight.T)
    is_setting = in_float64[0, 1] > in_float64[0, 0] and in_float32[0, 1] == in_float32[0, 0]
    assert is_setting, "the setting of this test"
    assert made(x)[0].tolist() == [[1]]
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x)[0].tolist() == [[1]], "autocast must not reach the router"


def naive_experts(e: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Token by token, choice by choice."""
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            hidden = F.relu(e.up_proj[expert] @ x[token]).square()
            if e.gate_proj is not None:
                hidden = F.silu(e.gate_proj[expert] @ x[token]) * (e.up_proj[expert] @ x[token])
            y[token] += weight * (e.down_proj[expert] @ hidden)
    return y


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 13])
def test_experts(num_tokens: int, gated: bool) -> None:
    """Guards sorting by expert and back: outputs that land on the wrong token, unused experts."""
    experts = Experts(5, 4, 6, gated).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_()
    x, weights = torch.randn(num_tokens, 4), torch.rand(num_tokens, 2)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(num_tokens)])  # expert 4: never
    found = experts(x, chosen, weights)
    torch.testing.assert_close(found, naive_experts(experts, x, chosen, weights))
    all_on_one = torch.full((num_tokens, 1), 2)
    found = experts(x, all_on_one, weights[:, :1])
    torch.testing.assert_close(found, naive_experts(experts, x, all_on_one, weights[:, :1]))


def test_the_shared_expert_is_added_once_and_unweighted() -> None:
    """Guards `n_shared_experts`, which changes nothing, and the routed scale, which spares it."""
    outputs = []
    for count in (1, 2):
        moe = MoE(16, tiny_moe(n_shared_experts=count, routed_scaling_factor=3.0))
        moe.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in moe.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        x = torch.randn(2, 3, 16, generator=generator)
        outputs.append(moe(x))
        tokens = x.flatten(0, 1)
        routed = moe.experts(tokens, *moe.gate(tokens)).view_as(x)
        torch.testing.assert_close(outputs[-1], routed + moe.shared_experts(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_and_gated_experts_are_those_of_transformers(
    norm: bool, dtype: torch.dtype
) -> None:
    """Guards a softmax over the chosen alone, gate and up in each other's place, and weights that
    are normed unasked. In bfloat16 theirs rounds scores, which is no model's definition: its own
    choice is given to the experts here."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
    theirs = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(hidden_size=16, norm_topk_prob=norm, experts_implementation="eager", **sizes)
    ).requires_grad_(False)
    spec = MoESpec(
        num_experts=6, experts_per_token=3, intermediate_size=12, shared_intermediate_size=0,
        norm_topk_prob=norm, router="softmax", gated=True,
    )  # fmt: skip
    moe = MoE(16, spec).requires_grad_(False)
    names = {"gate.weight", "experts.gate_proj", "experts.up_proj", "experts.down_proj"}
    assert moe.state_dict().keys() == names
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)
    moe.gate.weight.copy_(theirs.gate.weight)
    for part, value in (("gate", gate), ("up", up), ("down", theirs.experts.down_proj)):
        getattr(moe.experts, f"{part}_proj").copy_(value)
    x = torch.randn(2, 5, 16, generator=generator)
    _, weights, chosen = theirs.gate(x)
    found = moe.gate(x.flatten(0, 1))
    assert torch.equal(found[0], chosen)
    torch.testing.assert_close(found[1], weights)
    theirs, moe, x = theirs.to(dtype), moe.to(dtype), x.to(dtype)
    routed = moe.experts(x.flatten(0, 1), chosen, weights).view_as(x)
    expected = theirs.experts(x.flatten(0, 1), chosen, weights.to(dtype)).view_as(x)
    # bfloat16: theirs rounds the weights and each summand.
    close = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    torch.testing.assert_close(routed, expected, **close)
    if dtype == torch.float32:
        torch.testing.assert_close(moe(x), theirs(x))


def test_a_gated_shared_expert_is_added() -> None:
    """Guards a shared expert of the other kind than the routed ones: its gate would be unread."""
    spec = MoESpec(
        num_experts=3, experts_per_token=2, intermediate_size=5, shared_intermediate_size=7,
        gated=True,
    )  # fmt: skip
    moe = MoE(4, spec).requires_grad_(False)
    for parameter in moe.parameters():
        parameter.normal_()
    x = torch.randn(2, 3, 4)
    routed = moe.experts(x.flatten(0, 1), *moe.gate(x.flatten(0, 1))).view_as(x)
    gate, up, down = (moe.get_parameter(f"shared_experts.{n}_proj.weight") for n in PARTS)
    shared = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(moe(x), routed + shared)
