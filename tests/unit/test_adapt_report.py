"""What adapt measures at its end."""

import time
from collections.abc import Sequence

import pytest

from tiny_adapt import backbone, thin
from twotower import Completion, GenerateOptions, TwoTower, generate
from twotower.adapt import report
from twotower.adapt.answers import Question
from twotower.model.backend import PassCosts
from twotower.model.eager import EagerBackend


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


def test_time_of_other_programs_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the report of a busy machine: two prompts gave 0.7 to 1.9 times AR by chance."""

    def held_up(
        model: TwoTower, prompts: Sequence[Sequence[int]], options: GenerateOptions
    ) -> list[Completion]:
        time.sleep(0.5 if options.mode == "speculative" else 0.0)
        return generate(model, prompts, options)

    monkeypatch.setattr(report, "generate", held_up)
    model = backbone()
    question = Question(number=0, prompt=[1, 2, 3], task="t")
    (pair,) = report.compare(model, thin(model), [question], 6)
    assert pair.speculative_s < 0.5
