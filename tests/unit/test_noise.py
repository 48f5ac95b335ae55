import pytest
import torch

from twotower.diffusion.noise import MIN_T, SCHEDULES, alpha, alpha_prime, corrupt, grid_time

MASK = 3


def uniform(tokens: torch.Tensor) -> torch.Tensor:
    return torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_runs_from_one_to_zero(schedule: str) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    values = alpha(schedule, t)
    assert values[0] == 1 and values[-1].abs() < 1e-15
    assert bool((values.diff() < 0).all())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_prime_is_minus_the_derivative(schedule: str) -> None:
    """Guards the ELBO weight: a wrong sign or factor trains silently towards something else."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(alpha(schedule, t).sum(), t)
    torch.testing.assert_close(alpha_prime(schedule, t.detach()), -slope)


def test_unknown_schedule() -> None:
    for function in (alpha, alpha_prime):
        with pytest.raises(ValueError, match=r"schedule = 'sine': choose one of linear, cosine"):
            function("sine", torch.zeros(1))  # type: ignore[arg-type] # the error under test


def test_grid_time_per_row() -> None:
    steps = torch.tensor([1, 4])
    assert grid_time(0, steps).tolist() == [1.0, 1.0]
    assert grid_time(1, steps)[0].item() == pytest.approx(MIN_T)
    assert grid_time(1, steps)[1].item() == pytest.approx(0.75 + MIN_T / 4)


def test_corrupt_masks_with_probability_t() -> None:
    """Guards against t and 1 - t, or one t for all rows: each row has its own masked share."""
    tokens = torch.randint(4, 50, (3, 20_000))
    t = torch.tensor([0.0, 0.3, 1.0])
    noisy, is_masked = corrupt(tokens, t, MASK, uniform(tokens))
    share = is_masked.float().mean(-1)
    assert share[0] == 0 and share[2] == 1
    assert share[1].item() == pytest.approx(0.3, abs=0.015)
    assert bool((noisy[is_masked] == MASK).all())
    assert torch.equal(noisy[~is_masked], tokens[~is_masked])


def test_corrupt_keeps_what_the_loss_mask_excludes() -> None:
    tokens = torch.randint(4, 50, (2, 64))
    loss_mask = torch.arange(64).expand(2, 64) >= 40
    noisy, is_masked = corrupt(tokens, torch.ones(2), MASK, uniform(tokens), loss_mask)
    assert torch.equal(is_masked, loss_mask)
    assert torch.equal(noisy[:, :40], tokens[:, :40])


def test_corrupt_with_a_time_per_block() -> None:
    tokens = torch.randint(4, 50, (2, 8))
    per_block = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat_interleave(4, dim=1)
    _, is_masked = corrupt(tokens, per_block, MASK, uniform(tokens))
    assert torch.equal(is_masked, per_block.bool())
