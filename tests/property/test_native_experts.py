"""Native passes through experts: against the PyTorch layers, in every shape and precision."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_models import masked_like, prompts_of, random_ids, random_model, tiny_config
from tiny_options import options_of
from twotower import TwoTower, accelerate, generate
from twotower.backends import Quantization
from twotower.config import TowerConfig, TwoTowerConfig
from twotower.kernels.quantised import to_eight_bits
from twotower.layers.moe import Experts, MoE
from twotower.model.precision import shared_copy
from twotower.native import library, tower
from twotower.native.backend import NativeBackend
from twotower.specs import MoESpec

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

CLOSE = {"rtol": 0.0, "atol": 2e-4}
# What a fixed size, a flag or an absent matrix would hide. A masked group's chance is 0, as if it
# tied: so all that are kept have a positive one in these.
SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "odd widths": {"intermediate_size": 21, "shared_intermediate_size": 7},
    "one of many": {"num_experts": 37, "experts_per_token": 1, "norm_topk_prob": False},
    "all of them": {"num_experts": 5, "experts_per_token": 5, "scaling_factor": 2.5},
    "groups": {"num_experts": 12, "num_groups": 3, "groups_per_token": 2, "experts_per_token": 3},
    "latent": {"latent_size": 9},
    "gated": {"gated": True, "router": "softmax", "shared_intermediate_size": 0},
    "gated, shared": {"gated": True, "num_experts": 9},
}


def expert_model(pattern: str = "ME*-E", **spec: object) -> TwoTower:
    """A small model with experts in both towers."""
    values: dict[str, object] = {
        "num_experts": 6, "experts_per_token": 2, "intermediate_size": 24,
        "shared_intermediate_size": 20,
    }  # fmt: skip
    plain = tiny_config(hybrid_override_pattern=pattern, block_size=40, hidden_size=32)
    moe = MoESpec(**(values | spec))  # type: ignore[arg-type]
    layers = tuple(moe if isinstance(x, MoESpec) else x for x in plain.context.layers)
    own = TowerConfig(hidden_size=32, vocab_size=41, layers=layers)
    config = TwoTowerConfig.full("nemotron_h", own, block_size=40, eos_token_ids=())
    model = random_model(config)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.abs_()
    return model


def logits(model: TwoTower, length: int) -> list[Tensor]:
    """What every kind of pass gives for `length` tokens behind 21."""
    cache = model.prefill(random_ids(2, 21), torch.tensor([21, 9]))
    block = masked_like(random_ids(2, length, seed=1))
    found = [model.denoise(block, cache.view(), torch.tensor([0.5, 1.0]))]
    found.append(model.extend(cache, random_ids(2, length, seed=2)))
    return [*found, model.next_logits(cache)]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_a_pass(name: str) -> None:
    """Guards who goes where: a token at another's expert, a weight of another choice, a remainder
    of a width show as wrong texts, not as errors."""
    plain = expert_model(**SHAPES[name])
    ours = accelerate(plain, "native")
    for length in (1, 2, 9, 17, 41, 105):
        for found, expected in zip(logits(ours, length), logits(plain, length), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


def rounded_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (K,) by a weight (N, K) in int8: groups of 32 of a token have a scale each."""
    matrix = to_eight_bits(weight)
    groups = F.pad(x, (0, -len(x) % 32)).view(-1, 32)
    step = groups.abs().amax(-1, keepdim=True) / 127
    whole = (groups * torch.where(step > 0, 1 / step, 0.0)).round() * step
    return (matrix.qdata * matrix.scale) @ whole.flatten()[: len(x)]


class Rounded(nn.Module):
    """Experts and the shared one as int8 computes them, one token after the other."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        moe, tokens = self.moe, x.flatten(0, 1)
        chosen, weights = moe.gate(tokens)
        inner, y = moe.fc1_latent_proj(tokens), []
        for token, own in enumerate(inner):
            parts = [
                weight * mlp(own, *matrices_of(moe.experts, int(expert)))
                for expert, weight in zip(chosen[token], weights[token], strict=True)
            ]
            y.append(moe.fc2_latent_proj(sum(parts)))
        routed = torch.stack(y)
        if (shared := moe.shared_experts) is not None:
            gate = None if shared.gate_proj is None else shared.gate_proj.weight
            own = (shared.up_proj.weight, shared.down_proj.weight, gate)
            routed += torch.stack([mlp(token, *own) for token in tokens])
        return routed.view_as(x)


def matrices_of(experts: Experts, expert: int) -> tuple[Tensor, Tensor, Tensor | None]:
    gate = experts.gate_proj
    found = None if gate is None else gate[expert]
    return experts.up_proj[expert], experts.down_proj[expert], found


def mlp(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None) -> Tensor:
    inner = rounded_product(x, up)
    gated = inner.relu().square() if gate is None else F.silu(rounded_product(x, gate)) * inner
    return rounded_product(gated, down)


@pytest.mark.parametrize("name", SHAPES)
def test_int8_is_of_each_expert_s_own_rows(name: str) -> None:
    """Guards the scales of a stack: an expert with another's is far off, and texts still flow."""
    plain = expert_model("E", **SHAPES[name])
    moe = plain.context_tower.layers[0].mixer
    with torch.no_grad():
        for stack in moe.experts.parameters():
            stack *= torch.logspace(-1, 0.5, len(stack))[:, None, None]  # scales differ
    ours, full = accelerate(plain, "native", "int8"), accelerate(plain, "native")
    rounded = shared_copy(plain)
    rounded.context_tower.layers[0].mixer = Rounded(moe)
    found, expected, other = (
        m.prefill(random_ids(3, 33)).last_hidden for m in (ours, rounded, full)
    )
    assert found is not None and expected is not None and other is not None
    # Tokens that round to the next whole number change what follows them a little.
    assert (found - expected).abs().mean() < 0.1 * (found - other).abs().mean()


@pytest.mark.parametrize("name", ["plain", "latent", "gated"])
def test_int4_is_of_each_expert_s_own_groups(name: str) -> None:
    """Guards where a stack's 4 bits lie: of weights that they hold exactly, only rounded tokens are
    left of the difference."""
    sizes = {"intermediate_size": 64, "shared_intermediate_size": 32}
    plain = expert_model("E", **(SHAPES[name] | sizes | {"latent_size": 32}))
    with torch.no_grad():
        for part in plain.context_tower.layers[0].mixer.parameters():
            whole = (part * 32).round().clamp(-8, 7)
            whole[..., ::32] = -8.0  # of each group
            part.copy_(whole / 32)
    ours, full = accelerate(plain, "native", "int4"), accelerate(plain, "native")
    found, expected = (model.prefill(random_ids(3, 33)).last_hidden for model in (ours, full))
    assert found is not None and expected is not None
    assert 0.0 < (found - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.fixture
def shared_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small models work in several threads, too."""
    before = torch.get_num_threads()
    monkeypatch.setattr(tower, "LARGE", 0)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_threads_change_no_bit(shared_work: None, quantization: Quantization) -> None:
    """Guards reproducibility: experts that add to a token at the same time add in any order."""
    ours, found = accelerate(expert_model(**SHAPES["latent"]), "native", quantization), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(logits(ours, 40))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["plain", "groups", "gated"])
def test_a_token_s_numbers_are_its_own(name: str, quantization: Quantization) -> None:
    """Guards lossless drafts: an expert takes one token of an AR step and several of a block, and a
    scale or a sum that depends on its company gives another text."""
    ours = accelerate(expert_model(**SHAPES[name]), "native", quantization)
    prompts = prompts_of([1, 9, 30, 70])
    texts = {}
    for mode in ("ar", "speculative"):
        o = options_of({}, {"mode": mode, "max_new_tokens": 40})
        texts[mode] = [row.tokens for row in generate(ours, prompts, o)]
        alone = [generate(ours, [prompt], o)[0].tokens for prompt in prompts]
        assert texts[mode] == alone
    assert texts["speculative"] == texts["ar"]


def test_nan_is_not_hidden() -> None:
    """Guards the check for damaged weights: a router that compares NaN chooses nobody, does not
    end, or never chooses the one expert whose scores are damaged."""
    for name in ("gate.weight", "experts.up_proj", "shared_experts.down_proj.weight"):
        for groups in (1, 2):
            plain = expert_model(num_groups=groups).requires_grad_(False)
            weight = plain.get_parameter(f"denoiser_tower.layers.1.mixer.{name}")
            (weight[3] if name == "gate.weight" else weight)[:] = math.nan
            ours = plain.with_backend(NativeBackend(plain, "none"))
            view = ours.prefill(random_ids(1, 5)).view()
            found = ours.denoise(masked_like(random_ids(1, 4)), view, None)
            assert bool(found.isnan().all()), (name, groups)
