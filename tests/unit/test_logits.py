"""Logits on their way to a choice."""

import pytest
import torch

from twotower.diffusion import require_finite
from twotower.engine import GenerateOptions
from twotower.engine.constraints import penalize
from twotower.engine.resolved import resolve_options
from twotower.engine.row import Row

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


def test_penalties_by_hand() -> None:
    """Guards what counts as history: repetition sees prompt and text, the others the text alone,
    and a position behind a draft counts the tokens before it and no later one.
    """
    given = GenerateOptions(
        mode="ar",
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=2.0,
        logit_bias={1: 3.0, 4: -8.0},
    )
    row = Row(0, [0, 1], resolve_options(given, {}))
    row.tokens = [2, 2]
    other = Row(1, [0, 1], resolve_options(GenerateOptions(mode="ar"), {}))
    logits = torch.tensor([-1.0, 1.0, 4.0, 6.0, 8.0]).expand(2, 3, 5)
    found = penalize(logits, [row, other], [[3], [3]])
    # -1 * 2; (1 + 3) / 2; 4 / 2 - 0.5 - 2 * 0.25; untouched; 8 - 8
    assert found[0, 0].tolist() == [-2.0, 2.0, 1.0, 6.0, 0.0]
    assert found[0, 1].tolist() == [-2.0, 2.0, 1.0, 2.25, 0.0]  # 6 / 2 - 0.5 - 0.25
    assert found[0, 2].tolist() == logits[0, 2].tolist()  # behind the draft
    assert torch.equal(found[1], logits[1])
    assert penalize(logits, [other, other], [[], []]).equal(logits)
