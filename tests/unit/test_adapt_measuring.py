"""What a training measures on the way, and how much of its time that may take."""

import json
import time
from itertools import count
from pathlib import Path

import pytest

from tiny_adapt import answers, backbone, features_of, thin
from twotower.adapt import run as stages
from twotower.adapt.budget import Budget
from twotower.adapt.features import find_places, write_part
from twotower.adapt.options import StepOptions, ThinOptions, WorkFolder
from twotower.adapt.training import Acceptance, measure


def test_a_measurement_ends_in_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards runs of minutes on a busy machine: the first point of the curve, whose time nobody
    knew, took half of the training. At least one answer is measured, else there is no curve.
    """
    model, ticks = thin(backbone()), count()
    write_part(model, answers(9), model.config.reads, tmp_path / "part-00000.safetensors")
    places, features = find_places(tmp_path), features_of(model)
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))  # a second for each answer
    for seconds, number in ((0.0, 1), (3.5, 4), (99.0, 9)):
        found = measure(model, features, places, seconds)
        assert found == measure(model, features, places[:number])
        assert found.answers == number


def test_all_points_are_of_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the curve: points of ever other answers would rise and fall by chance. And what each
    may take is a share of the time.
    """
    asked = list[tuple[int, float]]()

    def some(*given: object) -> Acceptance:
        asked.append((len(given[2]), given[3]))  # type: ignore[arg-type]
        time.sleep(0.01)
        return Acceptance(tokens_per_cycle=1.0, right=[], answers=2)

    monkeypatch.setattr(stages, "measure", some)
    monkeypatch.setattr(stages, "HELD_OUT", 5)
    work, shape = WorkFolder(tmp_path / "w"), ThinOptions(layers=1, draft_vocab=0)
    work.features.mkdir(parents=True)
    write_part(backbone(), answers(30), [6, 7], work.features / "part-00000.safetensors")
    work.answers.write_text("".join(json.dumps(vars(answer)) + "\n" for answer in answers(30)))
    budget = Budget(minutes=0.05)
    began = time.monotonic()
    list(stages.train(backbone(), work, shape, StepOptions(), budget, tmp_path / "d", "m"))
    of_seconds = max(60 * budget.minutes, time.monotonic() - began)
    assert [number for number, _ in asked] == [6] + [2] * (len(asked) - 1)
    assert len(asked) > 1
    assert all(0 < seconds <= 0.03 * of_seconds for _, seconds in asked)
    points = [json.loads(line) for line in work.curve.read_text().splitlines()]
    assert {point["answers"] for point in points} == {2}
