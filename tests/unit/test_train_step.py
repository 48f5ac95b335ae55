"""The two losses and the randomness of a step."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.model.initialise import copy_context_to_denoiser, randomise
from twotower.model.two_tower import TwoTower
from twotower.train.corruption import choose_blocks, corrupt_blocks
from twotower.train.data import Batch
from twotower.train.denoiser_options import DenoiserOptions
from twotower.train.options import TrainOptions
from twotower.train.presets import preset_config
from twotower.train.step import Loss, make_loss, next_token_loss, step_generator

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


def denoiser_loss(**values: object) -> Loss:
    options = TrainOptions.from_dict({"recipe": "denoiser", "init": "x"} | values)
    return make_loss(options, 16, compile=False)


def batch_of(tokens: Tensor) -> Batch:
    """Completions are the second half of each row."""
    is_completion = torch.zeros_like(tokens, dtype=torch.bool)
    is_completion[:, tokens.shape[1] // 2 :] = True
    return Batch(tokens=tokens, is_completion=is_completion)


def test_denoiser_loss_scores_masked_positions_of_the_same_place(
    model: TwoTower, tokens: Tensor
) -> None:
    """Silent failure: a shift by one, or visible tokens counted."""
    every = torch.ones_like(tokens, dtype=torch.bool)
    blocks = corrupt_blocks(tokens, every, 3, 16, DenoiserOptions(), step_generator(0, 7, 0))
    logits = model.training_logits(tokens, blocks.noisy, blocks.t, 16)
    expected = F.cross_entropy(logits[blocks.is_masked], tokens[blocks.is_masked])
    loss = denoiser_loss()(model, batch_of(tokens), step_generator(0, 7, 0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_elbo_weighted_loss_divides_by_t_and_by_all_positions(
    model: TwoTower, tokens: Tensor
) -> None:
    """Silent failure: a bound that is weighted by what the denoiser is told, not by t."""
    every = torch.ones_like(tokens, dtype=torch.bool)
    options = DenoiserOptions(t_per="block", condition_on="nothing")
    blocks = corrupt_blocks(tokens, every, 3, 16, options, step_generator(0, 7, 0))
    logits = model.training_logits(tokens, blocks.noisy, None, 16)
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    weighted = losses.view(3, 2, 16) * blocks.is_masked.view(3, 2, 16) / blocks.sampled_t[..., None]
    loss = denoiser_loss(loss_weight="elbo", t_per="block", condition_on="nothing")
    found = loss(model, batch_of(tokens), step_generator(0, 7, 0))
    assert found.item() == pytest.approx(weighted.mean().item(), rel=1e-5)


def test_denoiser_gradients_stay_out_of_a_frozen_context(model: TwoTower, tokens: Tensor) -> None:
    model.context_tower.requires_grad_(False)
    model.context_lm_head.requires_grad_(False)
    denoiser_loss()(model, batch_of(tokens), step_generator(0, 0, 0)).backward()
    for name, parameter in model.named_parameters():
        is_context = name.startswith("context_")
        assert (parameter.grad is None) == is_context, name
    assert model.denoiser_tower is not None
    assert model.denoiser_tower.embeddings.weight.grad is not None


def test_corruption_masks_about_t_of_each_row() -> None:
    tokens = torch.randint(4, VOCAB, (200, 256))
    every = torch.ones_like(tokens, dtype=torch.bool)
    blocks = corrupt_blocks(tokens, every, 3, 16, DenoiserOptions(), step_generator(0, 0, 0))
    t, noisy, is_masked = blocks.t, blocks.noisy, blocks.is_masked
    assert t is not None and t.shape == (200,)
    assert t.min() >= 1e-3 and t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.5, abs=0.08)
    error = is_masked.float().mean(1) - t
    assert error.abs().max() < 5 * math.sqrt(0.25 / 256)  # five standard deviations
    assert torch.equal(noisy == 3, is_masked)
    assert torch.equal(noisy[~is_masked], tokens[~is_masked])
    assert torch.equal(blocks.clean, tokens)


def test_shares_of_the_corruption() -> None:
    """Silent failure: drafts are never trained for, or a given first token is scored."""
    tokens = torch.randint(4, VOCAB, (100, 256))
    is_target = batch_of(tokens).is_completion
    options = DenoiserOptions(
        targets="completion", blocks_per_row=20, t_per="block", draft_share=0.3,
        first_given_share=0.5, condition_on="masked-fraction",
    )  # fmt: skip
    blocks = corrupt_blocks(tokens, is_target, 3, 16, options, step_generator(0, 0, 0))
    assert blocks.index.shape == (100, 20) and blocks.index.min() == 8  # completions alone
    assert {tuple(row.bincount(minlength=16)[8:].tolist()) for row in blocks.index} <= {
        t for t in map(tuple, torch.cartesian_prod(*[torch.tensor([2, 3])] * 8).tolist())
    }
    rows = torch.arange(100).unsqueeze(1)
    assert torch.equal(blocks.clean.view(100, 20, 16), tokens.view(100, 16, 16)[rows, blocks.index])
    fraction = blocks.is_masked.view(100, 20, 16).float().mean(2)
    assert torch.equal(blocks.t, fraction)
    whole, all_but_first = (fraction == 1).float().mean(), (fraction == 15 / 16).float().mean()
    assert 0.12 < whole < 0.20 and 0.13 < all_but_first < 0.24  # about 0.3 * 0.5 each
    first = blocks.is_masked.view(100, 20, 16)[:, :, 0].float().mean()
    assert first.item() == pytest.approx(0.5 * (0.3 + 0.7 * 0.5), abs=0.05)


def test_prompts_are_never_masked() -> None:
    """Silent failure: the loss is spent on what generation never has to write."""
    tokens = torch.randint(4, VOCAB, (50, 64))
    is_target = torch.rand(50, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    blocks = corrupt_blocks(
        tokens, is_target, 3, 16, DenoiserOptions(draft_share=1.0), step_generator(0, 0, 0)
    )
    assert torch.equal(blocks.is_masked, is_target)


def test_chosen_blocks_repeat_only_when_they_are_few() -> None:
    """Silent failure: a row's blocks are learnt unevenly, or blocks without a target are chosen."""
    has_target = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    seen = set()
    for seed in range(20):
        chosen = choose_blocks(has_target, 3, torch.Generator().manual_seed(seed))
        assert set(chosen[0].tolist()) == {1, 3}
        assert len(set(chosen[1].tolist())) == 3 and len(set(chosen[2].tolist())) == 3
        seen.add(tuple(chosen[1].tolist()))
    assert len(seen) > 10


def test_randomness_depends_on_seed_step_and_pass_only() -> None:
    """Silent failure: all passes of a step share one noise, or a resumed run draws other noise."""
    draws = {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1 << 40, 0)]:
        torch.rand(3)  # the global generator must not matter
        draws[key] = tuple(torch.rand(4, generator=step_generator(*key)).tolist())
        assert draws[key] == tuple(torch.rand(4, generator=step_generator(*key)).tolist())
    assert len(set(draws.values())) == 5
