import pytest
import torch
from torch import Tensor

from twotower.diffusion.commit import count_confident, select_commits
from twotower.diffusion.scheduled import (
    count_adaptive,
    count_scheduled,
    posterior_commit_probability,
    top2_margin,
)


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def test_most_confident_masked_positions() -> None:
    scores = row(0.9, 0.1, 0.8, 0.7)
    is_masked = row(0, 1, 1, 1).bool()
    assert select_commits(scores, is_masked, torch.tensor([2])).tolist() == [
        [False, False, True, True]
    ]


def test_ties_go_to_the_earlier_position() -> None:
    """Guards an unstable sort: bfloat16 logits tie exactly, over blocks of any length."""
    for length in (4, 16, 64, 300):
        scores = torch.full((2, length), 0.5)
        is_masked = torch.ones(2, length).bool()
        is_masked[:, 1] = False
        chosen = select_commits(scores, is_masked, torch.tensor([3, 1]))
        assert chosen[0].nonzero().flatten().tolist() == [0, 2, 3]
        assert chosen[1].nonzero().flatten().tolist() == [0]


def test_counts_beyond_the_masked_positions_change_nothing() -> None:
    is_masked = row(1, 0, 1).bool()
    assert torch.equal(select_commits(row(0.5, 0.5, 0.5), is_masked, torch.tensor([9])), is_masked)
    assert not select_commits(row(0.5, 0.5, 0.5), is_masked, torch.tensor([0])).any()


@pytest.mark.parametrize(
    ("threshold", "steps_left", "expected"),
    [
        (0.5, 10, 2),  # two above
        (0.6, 10, 1),  # the threshold itself is not above: one
        (0.99, 10, 1),  # none above: still one
        (0.99, 2, 2),  # ceil(3 / 2)
        (0.99, 1, 3),  # last step: all
        (0.0, 10, 3),  # a given position does not count
    ],
)
def test_count_confident(threshold: float, steps_left: int, expected: int) -> None:
    confidence, is_masked = row(0.6, 0.7, 0.2, 0.9), row(1, 1, 1, 0).bool()
    counts = count_confident(
        confidence, is_masked, torch.tensor([threshold]), torch.tensor([steps_left])
    )
    assert counts.tolist() == [expected]


def test_count_confident_per_row() -> None:
    """Guards per-row options: the first row's threshold and steps must not serve all."""
    confidence = row(0.6, 0.6, 0.6, 0.6).expand(3, 4)
    is_masked = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    counts = count_confident(
        confidence, is_masked, torch.tensor([0.5, 0.7, 0.5]), torch.tensor([4, 2, 1])
    )
    assert counts.tolist() == [4, 2, 0]


def test_count_scheduled() -> None:
    num_masked = torch.tensor([8, 8, 2, 8, 0])
    keep = torch.tensor([5.33, 8.0, 5.0, 0.0, 5.0])
    assert count_scheduled(num_masked, keep).tolist() == [3, 1, 1, 8, 0]


def test_count_adaptive() -> None:
    steps = torch.tensor([5])
    counts = [count_adaptive(torch.tensor([6]), step, steps).item() for step in range(5)]
    assert counts == [1, 1, 2, 3, 6]  # 2/5 is no longer below 0.4
    assert count_adaptive(torch.tensor([6, 0]), 0, torch.tensor([1, 9])).tolist() == [6, 0]


def test_posterior_is_a_distribution() -> None:
    """Committing and staying masked share all the mass: (1 - alpha_s) / (1 - alpha_t) stays."""
    alpha_t, alpha_next = torch.tensor([0.0, 0.3]), torch.tensor([0.25, 0.5])
    chance = posterior_commit_probability(alpha_t, alpha_next)
    torch.testing.assert_close(1 - chance, (1 - alpha_next) / (1 - alpha_t))


def test_top2_margin() -> None:
    assert top2_margin(row(0.1, 0.6, 0.3)).item() == pytest.approx(0.3)
