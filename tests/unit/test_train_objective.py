"""What a step learns: the two objectives, their masks, and noise that belongs to the row."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.model.initialise import copy_context_to_denoiser, randomise
from twotower.model.two_tower import TwoTower
from twotower.train.data import Batch
from twotower.train.objective import (
    MaskedBlocks,
    NextToken,
    Noise,
    NoisyBlocks,
    choose_blocks,
    corrupt_blocks,
    row_noise,
)
from twotower.train.options import DiffusionObjectiveOptions
from twotower.train.presets import preset_config

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
    inputs = NextToken().draw(batch_of(tokens), noise())
    assert inputs.counts.tolist() == [93]
    found = NextToken().loss_sums(model, inputs)
    assert found.item() == pytest.approx(-torch.stack(picked).sum().item(), rel=1e-5)


def test_backbone_loss_ignores_the_future(model: TwoTower, tokens: Tensor) -> None:
    """The last token is a target only: as an input it must not matter."""
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1 - 4) % (VOCAB - 4) + 4
    one, two = (model.context_logits(ids)[:, :-1] for ids in (tokens, changed))
    assert torch.equal(one, two)


def noise(num_rows: int = 3, step: int = 7) -> Noise:
    return row_noise(0, step, range(num_rows))


def objective(**values: object) -> MaskedBlocks:
    return MaskedBlocks(DiffusionObjectiveOptions(**values), 16, 3)  # type: ignore[arg-type]


def mean(model: TwoTower, objective: MaskedBlocks, inputs: NoisyBlocks) -> Tensor:
    return (objective.loss_sums(model, inputs) / inputs.counts).sum()


def batch_of(tokens: Tensor) -> Batch:
    """Completions are the second half of each row."""
    is_completion = torch.zeros_like(tokens, dtype=torch.bool)
    is_completion[:, tokens.shape[1] // 2 :] = True
    return Batch(tokens=tokens, is_completion=is_completion)


def corrupted(tokens: Tensor, is_target: Tensor | None = None, **values: object) -> NoisyBlocks:
    is_target = torch.ones_like(tokens, dtype=torch.bool) if is_target is None else is_target
    options = DiffusionObjectiveOptions(**values)  # type: ignore[arg-type]
    return corrupt_blocks(tokens, is_target, noise(len(tokens), 0), 3, 16, options)


def test_denoiser_loss_scores_masked_positions_of_the_same_place(
    model: TwoTower, tokens: Tensor
) -> None:
    """Silent failure: a shift by one, or visible tokens counted."""
    blocks = objective().draw(batch_of(tokens), noise())
    logits = model.training_logits(tokens, blocks.noisy, blocks.t, 16)
    expected = F.cross_entropy(logits[blocks.is_masked], tokens[blocks.is_masked])
    assert mean(model, objective(), blocks).item() == pytest.approx(expected.item(), rel=1e-5)
    assert blocks.counts.tolist() == [blocks.is_masked.sum()]


def test_elbo_weighted_loss_divides_by_t_and_by_all_positions(
    model: TwoTower, tokens: Tensor
) -> None:
    """Silent failure: a bound that is weighted by what the denoiser is told, not by t."""
    values = {"mask_rate_per": "block", "loss_weight": "elbo"}
    t = objective(**values).draw(batch_of(tokens), noise()).t
    elbo = objective(**values, condition_on="none")
    blocks = elbo.draw(batch_of(tokens), noise())
    assert blocks.t is None and t is not None
    logits = model.training_logits(tokens, blocks.noisy, None, 16)
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    weighted = losses.view(3, 2, 16) * blocks.is_masked.view(3, 2, 16) / t[..., None]
    found = mean(model, elbo, blocks)
    assert found.item() == pytest.approx(weighted.mean().item(), rel=1e-5)


def test_denoiser_gradients_stay_out_of_a_frozen_context(model: TwoTower, tokens: Tensor) -> None:
    model.context_tower.requires_grad_(False)
    model.context_lm_head.requires_grad_(False)
    mean(model, objective(), objective().draw(batch_of(tokens), noise())).backward()
    for name, parameter in model.named_parameters():
        is_context = name.startswith("context_")
        assert (parameter.grad is None) == is_context, name
    assert model.denoiser_tower is not None
    assert model.denoiser_tower.embeddings.weight.grad is not None


def test_corruption_masks_about_t_of_each_row() -> None:
    tokens = torch.randint(4, VOCAB, (200, 256))
    blocks = corrupted(tokens)
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
    blocks = corrupted(
        tokens, is_target, denoised_blocks_per_row=20, mask_rate_per="block",
        fully_masked_fraction=0.3, first_token_visible_fraction=0.5,
        condition_on="masked-fraction",
    )  # fmt: skip
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
    blocks = corrupted(tokens, is_target, fully_masked_fraction=1.0)
    assert torch.equal(blocks.is_masked, is_target)


def test_chosen_blocks_repeat_only_when_they_are_few() -> None:
    """Silent failure: a row's blocks are learnt unevenly, or blocks without a target are chosen."""
    has_target = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    seen = set()
    for seed in range(20):
        keys = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
        chosen = choose_blocks(has_target, 3, keys)
        assert set(chosen[0].tolist()) == {1, 3}
        assert len(set(chosen[1].tolist())) == 3 and len(set(chosen[2].tolist())) == 3
        seen.add(tuple(chosen[1].tolist()))
    assert len(seen) > 10


def test_noise_depends_on_seed_step_and_row_only() -> None:
    """Silent failure: rows of a step share one noise, a resumed run draws other noise, or the
    company in which a row is drawn decides it.
    """
    draws = {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1 << 40, 0), (0, 0, 1 << 40)]:
        torch.rand(3)  # the global generator must not matter
        seed, step, row = key
        draws[key] = tuple(row_noise(seed, step, [row])(4)[0].tolist())
        among_others = row_noise(seed, step, [7, row, 8])(4)
        assert draws[key] == tuple(among_others[1].tolist()) != tuple(among_others[0].tolist())
    assert len(set(draws.values())) == 6


def split(tokens: Tensor, sizes: list[int], **values: object) -> list[NoisyBlocks]:
    """The rows in passes of these sizes, as the loop draws them."""
    drawn, start = [], 0
    for size in sizes:
        rows = range(start, start + size)
        batch = batch_of(tokens[rows.start : rows.stop])
        drawn.append(objective(**values).draw(batch, row_noise(5, 3, rows)))
        start = rows.stop
    return drawn


@pytest.mark.parametrize("targets", ["all", "completion"])
@pytest.mark.parametrize("sizes", [[8], [2] * 4, [4, 4], [1] * 8, [3, 5]])
def test_a_row_is_masked_alike_in_every_split(targets: str, sizes: list[int]) -> None:
    """Silent failure: a batch of 4 x 2 passes that continues a run of 8 draws other noise."""
    tokens = torch.randint(4, VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))
    values = {"targets": targets, "denoised_blocks_per_row": 3, "fully_masked_fraction": 0.3}
    (whole,), parts = split(tokens, [8], **values), split(tokens, sizes, **values)
    for name in ("index", "noisy", "is_masked", "t"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name)), name
    assert sum(part.counts for part in parts).tolist() == whole.counts.tolist()
