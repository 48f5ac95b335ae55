"""The two losses and the randomness of a step."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.model.initialise import copy_context_to_denoiser, randomise
from twotower.model.two_tower import TwoTower
from twotower.train.presets import preset_config
from twotower.train.step import corrupt_rows, make_loss, next_token_loss, step_generator

VOCAB = 270


@pytest.fixture
def model() -> TwoTower:
    model = TwoTower(preset_config("tiny", VOCAB))
    randomise(model, 1)
    copy_context_to_denoiser(model, 2)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(4, VOCAB, (3, 32))


def test_backbone_loss_is_shifted_by_one(model: TwoTower, tokens: Tensor) -> None:
    """Silent failure: the tower learns to copy its input, or to predict two ahead."""
    scores = model.context_logits(tokens).log_softmax(-1)
    picked = [scores[b, i, tokens[b, i + 1]] for b in range(3) for i in range(31)]
    expected = -torch.stack(picked).mean()
    assert next_token_loss(model, tokens).item() == pytest.approx(expected.item(), rel=1e-5)


def test_backbone_loss_ignores_the_future(model: TwoTower, tokens: Tensor) -> None:
    """The last token is a target only: as an input it must not matter."""
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1 - 4) % (VOCAB - 4) + 4
    one, two = (model.context_logits(ids)[:, :-1] for ids in (tokens, changed))
    assert torch.equal(one, two)


def test_denoiser_loss_scores_masked_positions_of_the_same_place(
    model: TwoTower, tokens: Tensor
) -> None:
    """Silent failure: a shift by one, or visible tokens counted."""
    t, noisy, is_masked = corrupt_rows(tokens, 3, step_generator(0, 7, 0))
    logits = model.training_logits(tokens, noisy, t, 16)
    expected = F.cross_entropy(logits[is_masked], tokens[is_masked])
    loss = make_loss("denoiser", 16, compile=False)(model, tokens, step_generator(0, 7, 0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_denoiser_gradients_stay_out_of_a_frozen_context(model: TwoTower, tokens: Tensor) -> None:
    model.context_tower.requires_grad_(False)
    model.context_lm_head.requires_grad_(False)
    make_loss("denoiser", 16, compile=False)(model, tokens, step_generator(0, 0, 0)).backward()
    for name, parameter in model.named_parameters():
        is_context = name.startswith("context_")
        assert (parameter.grad is None) == is_context, name
    assert model.denoiser_tower is not None
    assert model.denoiser_tower.embeddings.weight.grad is not None


def test_corruption_masks_about_t_of_each_row() -> None:
    tokens = torch.randint(4, VOCAB, (200, 256))
    t, noisy, is_masked = corrupt_rows(tokens, 3, step_generator(0, 0, 0))
    assert t.min() >= 1e-3 and t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.5, abs=0.08)
    error = is_masked.float().mean(1) - t
    assert error.abs().max() < 5 * math.sqrt(0.25 / 256)  # five standard deviations
    assert torch.equal(noisy == 3, is_masked)
    assert torch.equal(noisy[~is_masked], tokens[~is_masked])


def test_randomness_depends_on_seed_step_and_pass_only() -> None:
    """Silent failure: all passes of a step share one noise, or a resumed run draws other noise."""
    draws = {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1 << 40, 0)]:
        torch.rand(3)  # the global generator must not matter
        draws[key] = tuple(torch.rand(4, generator=step_generator(*key)).tolist())
        assert draws[key] == tuple(torch.rand(4, generator=step_generator(*key)).tolist())
    assert len(set(draws.values())) == 5
