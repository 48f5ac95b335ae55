"""The model at the start of a run and at its end: fresh, from a checkpoint, resumed, exported."""

from pathlib import Path
from typing import Literal

from twotower.checkpoint import load_model, save_backbone, save_model
from twotower.config import ModelConfig
from twotower.model.initialise import randomise
from twotower.model.two_tower import TwoTower
from twotower.tokenizer import load_tokenizer
from twotower.train.data import Shard
from twotower.train.options import Recipe, TrainOptions
from twotower.train.presets import preset_config
from twotower.train.run_folder import Snapshot, model_config

DEFAULT_PRESET = "small"


def starting_model(options: TrainOptions, vocab_size: int, snapshot: Snapshot | None) -> TwoTower:
    """The float32 model whose trainable parameters, and only those, require a gradient.

    With a snapshot only the architecture is taken from it: its weights are the caller's to load.
    ValueError if an initial checkpoint has another vocabulary than the data.
    """
    if snapshot is not None:
        model = TwoTower(model_config(snapshot), _towers(options.recipe))
    elif options.init is not None:
        model = _load_initial(options.init, options.recipe)
    else:
        model = TwoTower(new_config(options, vocab_size), _towers(options.recipe))
        randomise(model, options.seed)
    if model.config.vocab_size != vocab_size:
        raise ValueError(
            f"data: its vocabulary has {vocab_size} tokens, the model's {model.config.vocab_size}; "
            "prepare the data with --tokenizer set to the model's folder"
        )
    if options.recipe == "denoiser":
        model.context_tower.requires_grad_(False)
        model.context_lm_head.requires_grad_(False)
    return model


def new_config(options: TrainOptions, vocab_size: int) -> ModelConfig:
    """The configuration of a new backbone: the file's or the preset's, with the data's
    vocabulary.
    """
    if options.config is None:
        return preset_config(options.preset or DEFAULT_PRESET, vocab_size)
    given = ModelConfig.from_file(options.config)
    return ModelConfig.from_dict(given.to_dict() | {"vocab_size": vocab_size})


def export(model: TwoTower, path: Path, recipe: Recipe, shard: Shard) -> None:
    """Write the trained model with its tokenizer: the backbone layout, or both towers."""
    save = save_backbone if recipe == "backbone" else save_model
    save(model, path, extra_files=load_tokenizer(shard.folder).files())


def _load_initial(path: Path, recipe: Recipe) -> TwoTower:
    return load_model(path, towers=_towers(recipe))


def _towers(recipe: Recipe) -> Literal["both", "context"]:
    return "context" if recipe == "backbone" else "both"
