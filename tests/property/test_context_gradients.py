"""Training the context tower through what the denoiser reads of it: keys, values and states."""

import pytest
import torch
from torch import Tensor

from tiny_models import fresh_model, masked_like, random_ids
from twotower import TwoTower
from twotower.diffusion.loss import masked_loss_sum
from twotower.train.models import tie_towers
from twotower.train.objective import NoisyBlocks, block_sums, next_token_sum

CLEAN = random_ids(2, 12)
NOISY = masked_like(CLEAN)
T = torch.tensor([0.4, 0.9])


def denoiser_loss(model: TwoTower) -> Tensor:
    logits = model.training_logits(CLEAN, NOISY, T, 4)
    is_masked = NOISY != CLEAN
    return masked_loss_sum(logits.double(), CLEAN, is_masked) / is_masked.sum()


def context_gradients(model: TwoTower) -> dict[str, Tensor]:
    """By name, of the weights that a loss reached."""
    model.zero_grad()
    denoiser_loss(model).backward()
    tower = model.context_tower.named_parameters()
    return {name: p.grad for name, p in tower if p.grad is not None}


@pytest.mark.parametrize(
    ("pattern", "by"),
    [
        ("*-*", {"layers.0.mixer.k_proj.weight", "layers.0.mixer.v_proj.weight"}),
        ("M-M", {"layers.0.mixer.in_proj.weight", "layers.0.mixer.A_log"}),
    ],
    ids=["keys and values alone", "states alone"],
)
def test_gradients_pass_by_either_way(pattern: str, by: set[str]) -> None:
    """Silent failure: a state is detached, and the context learns from half of what is read.

    The first layer's weights matter by what the denoiser reads of it and by what later layers do.
    """
    found = context_gradients(fresh_model(hybrid_override_pattern=pattern))
    for name in {"embeddings.weight", "layers.1.mixer.up_proj.weight"} | by:
        assert name in found and float(found[name].abs().max()) > 1e-6, name
    last = "layers.2.mixer.o_proj.weight" if pattern == "*-*" else "layers.2.mixer.out_proj.weight"
    assert last not in found  # nothing reads the tower's own output
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("pattern", ["*-*", "M-M", "M*E-M*"])
@pytest.mark.parametrize("tied", [False, True], ids=["two", "tied"])
def test_gradients_are_finite_differences(pattern: str, tied: bool) -> None:
    """Silent failure: gradients of the wrong block, or through one use of a tied weight only.

    Along a random direction in which every component of the gradient counts up. The scan is
    float32, which leaves about 1e-7 / 2e-4 of noise in the quotient.
    """
    model = fresh_model(dtype=torch.float64, hybrid_override_pattern=pattern)
    if tied:
        tie_towers(model)
    found = context_gradients(model)
    weights = dict(model.context_tower.named_parameters())
    slopes = {n: found.get(n, torch.zeros_like(p)) for n, p in weights.items()}
    generator = torch.Generator().manual_seed(3)
    direction = {
        n: torch.randn(s.shape, generator=generator).abs() * torch.where(s < 0, -1.0, 1.0)
        for n, s in slopes.items()
    }
    expected = sum(float((slopes[n] * direction[n]).sum()) for n in weights)

    def moved(step: float) -> float:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(direction[name], alpha=step)
            value = float(denoiser_loss(model))
            for name, weight in weights.items():
                weight.sub_(direction[name], alpha=step)
        return value

    measured = (moved(1e-4) - moved(-1e-4)) / 2e-4
    assert expected > 1.0
    assert measured == pytest.approx(expected, rel=3e-3)


def test_a_frozen_context_gets_none() -> None:
    """Silent failure: an optimiser with momentum or decay moves the frozen tower all the same."""
    model = fresh_model()
    model.context_tower.requires_grad_(False)
    assert context_gradients(model) == {}
    denoiser = model.denoiser_tower
    assert denoiser is not None and denoiser.embeddings.weight.grad is not None


def test_a_block_trains_the_context_by_the_text_before_it_alone() -> None:
    """Silent failure: the states are one block late, and a block is told of its own clean text."""
    model = fresh_model()
    seen: list[Tensor] = []
    handle = model.context_tower.embeddings.register_forward_hook(
        lambda _module, _input, output: (output.retain_grad(), seen.append(output))[1]
    )
    logits = model.training_logits(CLEAN, NOISY, T, 4)
    handle.remove()
    logits[:, 8:].square().sum().backward()
    gradient = seen[0].grad
    assert gradient is not None
    reached = gradient.abs().amax(dim=(0, 2)) > 0
    assert reached.tolist() == [True] * 8 + [False] * 4


def test_the_next_token_loss_shares_the_pass() -> None:
    """Silent failure: the context head's loss is another one than the backbone's."""
    model = fresh_model()
    blocks = NoisyBlocks(
        context=CLEAN, index=torch.arange(3).expand(2, -1), clean=CLEAN, noisy=NOISY,
        is_masked=NOISY != CLEAN, t=T, weight=None,
    )  # fmt: skip
    (alone,) = block_sums(model, blocks, 4, has_next_token=False)
    both = block_sums(model, blocks, 4, has_next_token=True)
    added = next_token_sum(model, CLEAN)
    assert added.item() > 0.1
    assert both.tolist() == pytest.approx([alone.item(), added.item()], rel=1e-5)
    both.sum().backward()
    assert model.context_lm_head.weight.grad is not None
