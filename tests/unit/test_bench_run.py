"""What a benchmark refuses, the passes it times, and whether others disturbed it."""

import pytest

from tiny_models import tiny_model
from twotower.lab.bench.passes import PassShape, time_passes
from twotower.lab.bench.run import CpuLoad, MeasureOptions, others_used, parse_stat, take_load


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": "30B"}, "sizes: '30B' is unknown; use some of shipped, 32M, 160M"),
        ({"modes": "diffusion"}, "modes: diffusion lacks ar"),
        ({"modes": "ar,fast"}, "modes: 'fast' is unknown"),
        ({"backend": ","}, "backend: none given"),
        (
            {"backend": "auto,eager"},
            "backend: 'auto' is unknown; use some of eager, native, gra",
        ),
        ({"quantization": "fp8"}, "quantization: 'fp8' is unknown; use some of none, int8, int4"),
        ({"items": 0}, "items=0 must be at least 1"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_refusals(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MeasureOptions(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [3, 20, 40, 41])
def test_every_pass_is_timed_on_every_engine(mask: int) -> None:
    """Guards masks past the vocabulary, as those of Llamas are: no prompt could be drawn."""
    models = {seed: tiny_model(seed, mask_token_id=mask) for seed in (0, 1)}
    shape = PassShape(num_past=5, block_size=4, repeats=3, seed=0)
    times = time_passes(models, shape)
    calls = ("ar_step", "denoise_pass", "extend", "verify")
    assert set(times) == {(engine, call) for engine in models for call in calls}
    assert {len(values) for values in times.values()} == {3}
    assert all(0 < ms < 60_000 for values in times.values() for ms in values)


def load(wall_s: float, own_s: float, busy_s: float | None) -> CpuLoad:
    return CpuLoad(wall_s, own_s, busy_s)


def test_other_processes_are_noticed() -> None:
    """Silent failure: a benchmark beside a training run whose timings look like any others."""
    begin = load(0.0, 0.0, 100.0)
    assert others_used(begin, load(10.0, 8.0, 108.5), "32M") == []
    (line,) = others_used(begin, load(10.0, 8.0, 113.0), "32M")
    assert line.startswith("32M: other processes used 0.50 cores")
    assert others_used(begin, load(10.0, 8.0, None), "32M") == []  # the system does not say


def test_the_load_is_read_from_the_system() -> None:
    ticks = "cpu  100 20 30 999 999 5 5 40 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert parse_stat(ticks) == 2.0 and parse_stat("") is None
    found = take_load()
    assert found.wall_s > 0 and found.own_s > 0
