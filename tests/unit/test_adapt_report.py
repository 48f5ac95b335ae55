"""What adapt measures at its end."""

from collections.abc import Sequence

import pytest

from tiny_adapt import backbone, thin
from twotower import Completion, GenerateOptions, TwoTower, generate
from twotower.adapt import report
from twotower.adapt.answers import Question
from twotower.model.backend import EagerBackend, PassCosts


def test_what_is_done_once_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the first speed that a user sees: passes are timed once on a machine, at the first
    draft, and that made a denoiser look twenty times slower than it was."""
    told: list[str] = []
    costs = EagerBackend.pass_costs

    def asked(self: EagerBackend) -> PassCosts:
        told.append("costs")
        return costs

    def noted(
        model: TwoTower, prompts: Sequence[Sequence[int]], options: GenerateOptions
    ) -> list[Completion]:
        told.append(str(options.mode))
        return generate(model, prompts, options)

    monkeypatch.setattr(EagerBackend, "pass_costs", property(asked))
    monkeypatch.setattr(report, "generate", noted)
    model = backbone()
    questions = [Question(number=i, prompt=[1, 2, 3 + i], task="t") for i in range(2)]
    (one, two) = report.compare(model, thin(model), questions, 6)
    assert one.is_equal and two.is_equal
    timed = next(index for index, mode in enumerate(told) if mode == "ar")
    assert "costs" in told[:timed] and told[:timed].count("speculative") >= 2
