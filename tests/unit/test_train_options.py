"""Training options: validation, TOML, the learning-rate schedule, the groups of the optimiser."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from twotower.cli.train import arguments_from_toml, read_toml
from twotower.documented import field_docs, summary
from twotower.model.two_tower import TwoTower
from twotower.train.optimizer import is_decayed, learning_rate, make_optimizer
from twotower.train.options import TrainOptions
from twotower.train.prepare import PrepareOptions
from twotower.train.presets import PRESET_NAMES, preset_config


def options(**values: object) -> TrainOptions:
    return TrainOptions(**({"recipe": "backbone"} | values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"recipe": "both"},
        {"steps": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"sequence_length": 1},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"decay_fraction": 1.5},
        {"decay_fraction": math.nan},
        {"final_lr_ratio": -0.1},
        {"dtype": "float8"},
        {"betas": [0.9, 1.0]},
        {"weight_decay": -1.0},
        {"max_grad_norm": math.nan},
        {"seed": -1},
        {"seed": 1 << 63},
        {"threads": 0},
        {"keep_checkpoints": 0},
        {"block_size": 16},  # without effect on a backbone
        {"fully_masked_fraction": 0.5},
        {"fully_masked_fraction": 1.5},
        {"denoised_blocks_per_row": 0},
        {"mask_rate_per": "token"},
        {"towers": ["two"]},
        {"learning_rate": 10**400},
        {"condition_on": "time"},
    ],
)
def test_bad_values_are_one_line_that_names_the_field(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))) as caught:
        options(**values)
    assert "\n" not in str(caught.value)


def test_only_one_source_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"init.*preset"):
        options(init="a", preset="tiny")
    with pytest.raises(ValueError, match="needs the checkpoint folder of a trained backbone"):
        options(recipe="denoiser")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rat": 0.1}, "learning_rate"),
        ({"setps": 5}, "steps"),
        ({"steps": "many"}, "steps='many' must be a whole number"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"compile": 1}, "compile"),
        ({"betas": [0.9]}, "betas"),
        ({"init": 5}, "init"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused(values: dict[str, object], words: str) -> None:
    """Silent failure: a misspelt option is ignored and the default trains for hours."""
    with pytest.raises(ValueError, match=words):
        options(**values)


def test_the_constructor_checks_types_and_takes_paths_as_text() -> None:
    """Silent failure: from Python, a string of digits or a path as text fails deep in the run."""
    assert TrainOptions(recipe="backbone", data="a/b").data == Path("a/b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps='9' must be a whole number"):
        TrainOptions(recipe="backbone", steps="9")  # type: ignore[arg-type]


def test_every_option_has_a_group_and_a_help_text() -> None:
    docs = field_docs(TrainOptions)
    assert all(docs.get(field.name) for field in dataclasses.fields(TrainOptions))
    own = TrainOptions.__annotations__
    assert len(own) == 10  # those that matter first


@pytest.mark.parametrize("options_class", [TrainOptions, PrepareOptions])
def test_help_explains_every_field_and_the_command_line_does_not_repeat_it(
    options_class: type,
) -> None:
    text = options_class.__doc__ or ""
    for field in dataclasses.fields(options_class):
        assert f"\n{field.name}: " in text
    assert "\n" not in summary(options_class) and text.startswith(summary(options_class))


def test_options_survive_json() -> None:
    chosen = options(
        recipe="denoiser", init="runs/a", betas=[0.8, 0.9], learning_rate=1, output="x"
    )
    stored = json.loads(json.dumps(chosen.to_dict()))
    assert TrainOptions(**stored) == chosen
    assert chosen.init == Path("runs/a")
    assert chosen.learning_rate == 1.0
    assert chosen.run_folder == Path("x")
    assert options().run_folder == Path("runs/backbone")
    assert options(batch_size=3, accumulate=2, sequence_length=10).tokens_per_step == 60


def test_toml_becomes_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'recipe = "backbone"\nlearning-rate = 0.01\nbetas = [0.8, 0.9]\nreads = [0, 2]\n'
        'compile = true\nresume = false\noutput = "a"\n'
    )
    assert arguments_from_toml(file) == [
        *["--recipe", "backbone", "--learning-rate", "0.01"],
        *["--betas", "0.8", "0.9", "--reads", "0", "2"],
        *["--compile", "--no-resume", "--output", "a"],
    ]
    assert read_toml(file)["learning_rate"] == 0.01
    file.write_text('out = "a"')  # as older versions had it
    assert arguments_from_toml(file) == ["--output", "a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat = 1", "learning_rate"),
        ("steps = ", "not TOML"),
        (None, "cannot read"),
        ('out = "a"\noutput = "b"', ": output: is given in two spellings"),
        ("max_num_seqs = 4", "max_num_seqs: no such option"),
    ],
)
def test_bad_toml(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=words):
        arguments_from_toml(file)


def rates(**values: object) -> list[float]:
    chosen = options(**values)
    return [learning_rate(step, chosen.steps, 1.0, chosen) for step in range(chosen.steps)]


def test_schedule_warms_up_stays_and_decays() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]
    assert rates(steps=10, warmup_steps=4, decay_fraction=0.4, final_lr_ratio=0.1) == pytest.approx(
        expected
    )


def test_schedule_without_warmup_and_decay_is_constant() -> None:
    assert rates(steps=5, warmup_steps=0, decay_fraction=0.0) == [1.0] * 5


def test_schedule_is_never_above_the_peak_nor_negative() -> None:
    for decay in (0.0, 0.1, 0.5, 1.0):
        assert all(
            0.0 <= rate <= 1.0 for rate in rates(steps=7, warmup_steps=5, decay_fraction=decay)
        )


def test_weight_decay_reaches_matrices_only() -> None:
    """Silent failure: norms, decay rates or the adaLN gates are pulled towards zero."""
    model = TwoTower(preset_config("tiny", 270))
    decayed = {n for n, p in model.named_parameters() if is_decayed(n, p)}
    names = {name for name, _ in model.named_parameters()}
    assert {n for n in decayed if n.startswith("context_tower.")} == {
        "context_tower.layers.0.mixer.in_proj.weight",
        "context_tower.layers.0.mixer.conv1d.weight",
        "context_tower.layers.0.mixer.out_proj.weight",
        *(f"context_tower.layers.1.mixer.{p}_proj.weight" for p in "qkvo"),
        "context_tower.layers.2.mixer.up_proj.weight",
        "context_tower.layers.2.mixer.down_proj.weight",
    }
    assert "lm_head.weight" in decayed
    assert "scale_shift_tables.0" in names - decayed
    assert "denoiser_tower.embeddings.weight" in names - decayed


def test_optimiser_holds_each_trainable_parameter_once() -> None:
    model = TwoTower(preset_config("tiny", 270))
    model.context_tower.requires_grad_(False)
    optimizer = make_optimizer(model, options(weight_decay=0.3))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in trainable}
    assert len(held) == len(trainable)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_presets() -> None:
    for name in PRESET_NAMES:
        assert preset_config(name, 500).vocab_size == 500
    model = TwoTower(preset_config("small", 1024), "context")
    assert 2.0e6 < sum(p.numel() for p in model.parameters()) < 3.0e6
    moe = TwoTower(preset_config("moe", 1024))
    assert 2 * sum(p.numel() for p in moe.parameters()) < 5.5e6  # bytes in bfloat16
    with pytest.raises(ValueError, match="preset='huge' is unknown; use one of tiny, small, moe"):
        options(preset="huge")
