"""The eager and the native backend against dense cases that the eager one has recorded."""

from typing import get_args

import pytest

import recorded
from recorded import GOLDEN, Case
from twotower import TwoTower, accelerate, generate
from twotower.backends import BackendName

CASES = recorded.read_cases(GOLDEN / "ours", "dense_*")
BACKENDS = [name for name in get_args(BackendName) if name != "auto"]
# Two processors, or two backends, add sums in another order. The logits are up to 8.
CLOSE = 2e-4


@pytest.fixture(params=[(case, name) for case in CASES for name in BACKENDS], ids=str)
def subject(request: pytest.FixtureRequest) -> tuple[Case, TwoTower]:
    case, backend = request.param
    try:
        return case, accelerate(case.model, backend)
    except ValueError as error:
        if "compile" not in str(error):
            raise
        pytest.skip(str(error))


def test_all_cases_are_here() -> None:
    assert [case.folder.name for case in CASES] == ["dense_01", "dense_02"]


def test_every_recorded_tensor(subject: tuple[Case, TwoTower]) -> None:
    """Guards logits and states of a backend against any change of its arithmetic: a wrong state can
    leave the logits of the next token right and ruin later ones."""
    case, model = subject
    found = list(recorded.replay(model, case))
    assert {one.key for one in found} == case.keys
    worse = {one.key: case.difference(one) for one in found}
    assert {key: difference for key, difference in worse.items() if not difference <= CLOSE} == {}


def test_every_recorded_text(subject: tuple[Case, TwoTower]) -> None:
    """Guards decoding as a whole: all runs in one call, so that prompts of different lengths, modes
    and block sizes of 8 to 40 tokens share the machine."""
    case, model = subject
    runs = recorded.recorded_runs(case)
    assert len(runs) == 40
    found = generate(model, [run.prompt for run in runs], [run.options for run in runs])
    assert [one.tokens for one in found] == [run.tokens for run in runs]
    assert all(run.nfe in (None, one.nfe) for run, one in zip(runs, found, strict=True))
