"""What a race refuses, and the passes it times."""

import pytest
import torch

from tiny_models import tiny_config, tiny_model
from twotower import TwoTower
from twotower.checkpoint.empty import build_empty
from twotower.lab.race import run
from twotower.lab.race.options import RaceOptions
from twotower.lab.race.ours import ENGINES
from twotower.lab.race.passes import PassShape, time_passes
from twotower.lab.race.sizes import random_config, random_model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": "30B"}, "sizes: '30B' is unknown; use some of shipped, 32M, 160M"),
        ({"modes": "diffusion"}, "modes: diffusion lacks ar"),
        ({"modes": "ar,fast"}, "modes: 'fast' is unknown"),
        ({"engines": ","}, "engines: none given"),
        ({"items": 0}, "items: 0 is too small"),
        ({"repeats": 0}, "repeats: 0 is too small"),
        ({"seed": -1}, "seed: -1 is negative"),
    ],
)
def test_refusals(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RaceOptions(**changes)  # type: ignore[arg-type]


def test_names_are_split() -> None:
    options = RaceOptions(sizes="160M, shipped,160M")
    assert options.size_names == ("160M", "shipped")


def test_every_pass_is_timed_on_every_engine() -> None:
    models = {"one": tiny_model(), "two": tiny_model(1)}
    shape = PassShape(num_past=5, block_size=4, repeats=3, seed=0)
    times = time_passes(models, shape)
    calls = ("ar_step", "denoise_pass", "extend", "verify")
    assert set(times) == {(engine, call) for engine in models for call in calls}
    assert {len(values) for values in times.values()} == {3}
    assert all(0 < ms < 60_000 for values in times.values() for ms in values)


def test_random_models_have_the_sizes_of_their_names() -> None:
    """Silent failure: a row of the table is called 160M and streams something else."""
    for size, wanted in (("32M", 32e6), ("160M", 160e6)):
        config = random_config(size, block_size=16)
        model = build_empty(config, "context")
        count = sum(parameter.numel() for parameter in model.parameters())
        assert abs(count / wanted - 1) < 0.03
        assert config.eos_token_ids == () and config.block_size == 16
    assert (config.hidden_size, config.context.num_layers) == (1024, 24)


def test_random_models_repeat_with_the_seed() -> None:
    one, same, other = (random_model(tiny_config(), seed, torch.float32) for seed in (3, 3, 4))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert torch.equal(one.lm_head.weight, one.context_lm_head.weight)
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_an_engine_that_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent failure: the engine that was asked for is left out of the table."""

    def refuse(model: TwoTower) -> TwoTower:
        raise ValueError("no compiler; install one")

    monkeypatch.setattr(run, "ENGINES", {"pytorch": ENGINES["pytorch"], "other": refuse})
    model = tiny_model()
    engines, unable = run.open_engines(model, ["other", "pytorch"])
    assert engines == {"pytorch": model} and unable == ["other: no compiler; install one"]
    with pytest.raises(ValueError, match="engines: none can run this model"):
        run.open_engines(model, ["other"])
