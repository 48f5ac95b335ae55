"""Logits on their way to a choice."""

import pytest
import torch

from twotower.engine.logits import require_finite

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("bad", [[NAN], [INF], [-INF], [INF, -INF], [3e38, INF]])
def test_one_damaged_logit_is_found(bad: list[float]) -> None:
    """Silent failure: argmax passes over NaN, and infinities of both signs cancel in a sum."""
    logits = torch.randn(2, 3, 50)
    logits[1, 2, : len(bad)] = torch.tensor(bad)
    with pytest.raises(ValueError, match="logits are not finite"):
        require_finite(logits)


def test_large_logits_are_no_damage() -> None:
    """Silent failure: a sum overflows, and sound if extreme logits end the row."""
    logits = torch.full((1, 4, 50), 3e38)
    assert not torch.isfinite(logits.sum())
    assert require_finite(logits) is logits
