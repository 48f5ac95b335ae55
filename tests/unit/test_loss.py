import math

import pytest
import torch

from twotower.diffusion.loss import elbo_weight, masked_loss_sum, token_cross_entropy
from twotower.diffusion.noise import SCHEDULES, alpha, corrupt


def test_hand_computed() -> None:
    # two words; the target has probability 0.8 at position 0 and 0.5 at position 1
    logits = torch.tensor([[[math.log(4.0), 0.0], [1.0, 1.0], [9.0, -9.0]]])
    targets = torch.tensor([[0, 1, 1]])
    is_masked = torch.tensor([[True, True, False]])
    expected = -(math.log(0.8) + math.log(0.5))
    assert masked_loss_sum(logits, targets, is_masked).item() == pytest.approx(expected)


def test_nothing_masked_is_zero_with_zero_gradient() -> None:
    """Guards training: 0/0 on a row without masks turns every weight into NaN."""
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = masked_loss_sum(logits, torch.zeros(2, 3).long(), torch.zeros(2, 3).bool())
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and bool((logits.grad == 0).all())


def test_gradient_only_at_masked_positions() -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True)
    is_masked = torch.tensor([[True, False, True, False], [False, False, False, True]])
    masked_loss_sum(logits, torch.ones(2, 4).long(), is_masked).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, is_masked)


def test_low_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(1, 6, 50).bfloat16()
    losses = token_cross_entropy(logits, torch.zeros(1, 6).long())
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, -logits.float().log_softmax(-1)[..., 0])


def test_weight_per_row_and_per_token_agree() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    is_masked, weight = torch.ones(2, 3).bool(), torch.tensor([2.0, 10.0])
    per_row = masked_loss_sum(logits, targets, is_masked, weight)
    per_token = masked_loss_sum(logits, targets, is_masked, weight[:, None].expand(2, 3))
    rows = token_cross_entropy(logits, targets).sum(-1)
    torch.testing.assert_close(per_row, 2 * rows[0] + 10 * rows[1])
    assert torch.equal(per_row, per_token)


def test_linear_weight_is_one_over_t() -> None:
    t = torch.tensor([0.001, 0.25, 1.0])
    torch.testing.assert_close(elbo_weight("linear", t), 1 / t, rtol=1e-4, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weighted_loss_is_the_bound(schedule: str) -> None:
    """Guards the normaliser: for a model that knows nothing the bound is log V per token,
    whatever the schedule; of masked tokens alone it would weigh small t twice."""
    num_rows, length, vocab = 2000, 64, 7
    t = torch.linspace(1e-3, 1, num_rows, dtype=torch.float64)  # instead of U[1e-3, 1]
    tokens = torch.randint(0, vocab, (num_rows, length))
    uniform = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    _, is_masked = corrupt(tokens, 1 - alpha(schedule, t), vocab, uniform)
    logits = torch.zeros(1, 1, vocab).expand(num_rows, length, vocab)
    bound = masked_loss_sum(logits, tokens, is_masked, elbo_weight(schedule, t))
    assert bound.item() / tokens.numel() == pytest.approx(math.log(vocab), rel=0.03)
