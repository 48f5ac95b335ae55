"""What passes cost on this machine: measured once, and kept."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny_models import fresh_model
from twotower import ContextCache, accelerate
from twotower.model.backend import Backend, ContextInput, PassCosts
from twotower.native import costs

STEP = 2e-4  # seconds
measured = costs.pass_costs  # before a fixture replaces it


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_costs_are_what_passes_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards drafts that are as long as pays on somebody else's processor."""
    monkeypatch.setattr(costs, "_SECONDS", 0.05)
    *steps, step_s, share = costs.measure(
        lambda length: spin(STEP * (1 + length / 16)), lambda length: spin(STEP * length / 16)
    )
    assert step_s == pytest.approx(STEP * 17 / 16, rel=0.3) and share == pytest.approx(
        1 / 3, rel=0.3
    )
    expected = [(1 + length / 16) / (1 + 1 / 16) for length in costs._LENGTHS]
    assert steps == pytest.approx(expected, rel=0.3)
    assert steps[0] == 1 and steps == sorted(steps)


def test_what_others_take_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a table for ever from a busy moment: a longer pass that was fast by chance, and one
    that had to wait."""
    monkeypatch.setattr(costs, "_SECONDS", 0.0)
    calls = iter([0.0, *[STEP, 9 * STEP, STEP / 2, *[STEP] * 6], *[STEP] * 18])
    *steps, _, share = costs.measure(lambda length: spin(next(calls)))
    assert share == 0
    assert steps == pytest.approx([1.0] * 9, abs=0.3)


def test_a_held_up_pass_is_none_the_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards drafts on a busy machine: an AR step that had to wait for the core seemed slow, longer
    passes and the denoiser cheap beside it, and drafts that do not pay were made.
    """
    monkeypatch.setattr(costs, "_SECONDS", 0.0)

    def run(length: int) -> None:
        spin(STEP * length)
        time.sleep(0.002 if length == 1 else 0.0)

    *steps, step_s, share = costs.measure(run, lambda length: spin(STEP * length / 2))
    assert steps == pytest.approx([*costs._LENGTHS], rel=0.3)
    assert step_s == pytest.approx(STEP, rel=0.3) and share == pytest.approx(0.5, rel=0.3)


def test_a_machine_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards runs that repeat: another table makes other drafts. Other bits, threads or a damaged
    file are measured anew; where nothing can be kept, drafts are made all the same."""
    tables = iter([[1.0, *[n / 2] * 8, 0.01, 0.1] for n in range(3, 20)])
    monkeypatch.setattr(costs, "measure", lambda *_: next(tables))
    monkeypatch.setattr(os, "getloadavg", lambda: (load[0], 0.0, 0.0))
    load = [9.0]

    def found(quantization: str = "int8", folder: Path = tmp_path) -> float:
        return measured(lambda length: None, quantization, "one model", folder).tokens[32]

    assert [found(), found()] == [1.5, 2.0]  # others were running
    load[0] = 1.2
    assert [found(), found(), found("int4"), found()] == [2.5, 2.5, 3.0, 2.5]
    torch.set_num_threads(2)
    assert [found(), found()] == [3.5, 3.5]
    for damaged in (
        "",
        "[1.0]",
        '["a"]',
        "[1,1,1,1,1,1,1,1,1,1,null]",
        "[1,1,1,1,1,1,1,0,1,1,0]",
        "{}",
        "3",
    ):
        for file in tmp_path.iterdir():
            file.write_text(damaged)
        last = found()
        assert last == found() > 3.5
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert found(folder=blocked) != found(folder=blocked)


@pytest.mark.parametrize("pattern", ["*-*-", "M*-M*-"])
def test_what_is_timed_are_passes(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Guards the timed passes themselves, which no other test makes: each has its own number of
    tokens, and none leaves a trace in what comes after."""
    runs: list[int] = []

    def timed(run: Callable[[int], object], *rest: object) -> PassCosts:
        for length in costs._LENGTHS:
            run(length)
            runs.append(length)
        rest[-1](costs._DRAFTED)  # type: ignore[operator]  # of the denoiser
        return PassCosts({1: 1.0, 32: 1.5})

    monkeypatch.setattr(costs, "pass_costs", timed)
    ours = accelerate(fresh_model(hybrid_override_pattern=pattern), "native", "int8")
    lengths: list[int] = []
    whole = type(ours.backend).context_pass

    def noted(self: Backend, cache: ContextCache, asked: ContextInput) -> object:
        lengths.append(asked.tokens.shape[1])
        return whole(self, cache, asked)

    monkeypatch.setattr(type(ours.backend), "context_pass", noted)
    assert ours.pass_costs.tokens[32] == 1.5 and runs == [*costs._LENGTHS]
    assert lengths[1:] == runs  # after the text behind which they are made
    assert ours.pass_costs is ours.backend.pass_costs and len(runs) == len(costs._LENGTHS)
