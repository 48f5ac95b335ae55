"""What is said of a budget before it is spent."""

import re

import pytest

from tiny_adapt import backbone, thin
from twotower.adapt import estimate as module
from twotower.adapt.answers import Question
from twotower.adapt.budget import Budget
from twotower.adapt.estimate import estimate
from twotower.adapt.options import AnswerOptions, StepOptions, ThinOptions

TOKEN_S, STEP_S = 0.01, 2.0


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_answer_token_s", lambda *_: TOKEN_S)
    monkeypatch.setattr(module, "_training_step_s", lambda *_: STEP_S)


def said(count: int, minutes: float = 10) -> tuple[float, float, float]:
    """Tokens, tokens a second and blocks of some minutes with so many questions."""
    model = backbone()
    questions = [Question(number=i, prompt=[1, 2, 3], task="t") for i in range(count)]
    options = AnswerOptions(max_new_tokens=100), StepOptions(blocks_per_answer=1)
    budget = Budget(minutes=minutes, overhead_s=0 if minutes == 10 else 60)
    line = estimate(model, thin(model), ThinOptions(), *options, budget, questions)
    line = re.sub(r"([\d.]+) thousand", lambda m: str(1000 * float(m[1])), line)
    tokens, rate, blocks = re.findall(r"([\d.]+) (?:tokens of|a second|blocks)", line)
    return float(tokens), float(rate), float(blocks)


def test_an_estimate_is_of_what_is_kept(timed: None) -> None:
    """Guards what was a third too high: answers that the end of the time finds half written, and
    the time of training in which it is measured.
    """
    tokens, rate, blocks = said(5000)
    assert tokens == pytest.approx(240 / TOKEN_S - 32 * 25, rel=0.01)
    assert rate == pytest.approx(tokens / 240, rel=0.01)
    assert blocks == pytest.approx(4 * 0.9 * 330 / STEP_S, rel=0.01)


def test_few_questions_leave_their_time_to_training(timed: None) -> None:
    """Silent failure: answers are promised to questions that nobody asked."""
    tokens, rate, blocks = said(40)
    assert tokens == 40 * 50 and rate == pytest.approx(1 / TOKEN_S, rel=0.01)
    assert blocks == pytest.approx(4 * 0.9 * (330 + 240 - 20) / STEP_S, rel=0.01)


def test_a_budget_that_loading_uses_up_gives_nothing(timed: None) -> None:
    """Guards the smallest budgets: their refusal names the minutes, and follows the estimate."""
    assert said(40, minutes=0.5) == (0, 0, 0)
