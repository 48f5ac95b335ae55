"""The model at the start of a run and at its end: fresh, from a checkpoint, resumed, exported."""

from pathlib import Path
from typing import Literal

import torch

from twotower.checkpoint import load_model, save_backbone, save_model
from twotower.checkpoint.empty import allocate, build_empty
from twotower.config import TwoTowerConfig
from twotower.families import config_from_dict, config_to_dict, read_config
from twotower.model.initialise import randomise, remove_conditioning
from twotower.model.precision import require_plain
from twotower.model.two_tower import TwoTower
from twotower.tokenizer import load_tokenizer
from twotower.train.data import Shard
from twotower.train.options import Recipe, TrainOptions
from twotower.train.presets import preset_config
from twotower.train.run_folder import Position, model_config

DEFAULT_PRESET = "small"


def starting_model(options: TrainOptions, vocab_size: int, snapshot: Position | None) -> TwoTower:
    """The float32 model whose trainable parameters, and only those, require a gradient.

    With a snapshot only the architecture is taken from it: its weights are the caller's to load.
    ValueError if an initial checkpoint has another vocabulary than the data, or towers that differ
    where one is to be both.
    """
    if snapshot is not None:
        model = TwoTower(model_config(snapshot), _towers(options.recipe))
    elif options.init is not None:
        model = load_model(options.init, towers=_towers(options.recipe))
        require_plain(model, "training")
        if options.recipe == "denoiser":
            model = _with_denoiser(model, options)
    else:
        model = TwoTower(new_config(options, vocab_size), _towers(options.recipe))
        randomise(model, options.seed)
    if model.config.vocab_size != vocab_size:
        raise ValueError(
            f"data: its vocabulary has {vocab_size} tokens, the model's {model.config.vocab_size}; "
            "prepare the data with --tokenizer set to the model's folder"
        )
    _tie_and_freeze(model, options)
    return model


def empty_model(options: TrainOptions, config: TwoTowerConfig) -> TwoTower:
    """`starting_model` without values: memory that is not touched takes no room."""
    model = build_empty(config, _towers(options.recipe))
    allocate(model, (torch.float32, torch.float32), (torch.device("cpu"), torch.device("cpu")))
    _tie_and_freeze(model, options)
    return model


def new_config(options: TrainOptions, vocab_size: int) -> TwoTowerConfig:
    """The configuration of a new backbone: the file's or the preset's, with the data's
    vocabulary.
    """
    if options.config is None:
        return preset_config(options.preset or DEFAULT_PRESET, vocab_size)
    given = read_config(options.config)
    return config_from_dict(config_to_dict(given) | {"vocab_size": vocab_size})


def export(model: TwoTower, path: Path, recipe: Recipe, shard: Shard) -> None:
    """Write the trained model with its tokenizer: the backbone layout, or both towers."""
    save = save_backbone if recipe == "backbone" else save_model
    save(model, path, extra_files=load_tokenizer(shard.folder).files())


def _with_denoiser(model: TwoTower, options: TrainOptions) -> TwoTower:
    """The initial checkpoint with the denoiser and the configuration that the options ask for."""
    if options.is_tied and not _are_equal(model):
        raise ValueError(
            f"towers: {options.towers} needs one tower, but the two of {options.init} differ; give "
            "a backbone, or a model that was trained tied"
        )
    config = model.config.replace(
        block_size=options.block_size or model.config.block_size,
        bidirectional_mamba=options.bidirectional_mamba or model.config.bidirectional_mamba,
    )
    weights = model.state_dict()
    shaped = TwoTower(config)
    if options.denoiser_init == "scratch":
        randomise(shaped, options.seed)
        remove_conditioning(shaped, options.seed)
        own = ("context_tower.", "context_lm_head.")
        weights = shaped.state_dict() | {n: v for n, v in weights.items() if n.startswith(own)}
    shaped.load_state_dict(weights)
    return shaped


def _are_equal(model: TwoTower) -> bool:
    assert model.denoiser_tower is not None
    other = model.denoiser_tower.state_dict()
    return all(torch.equal(other[n], v) for n, v in model.context_tower.state_dict().items())


def _tie_and_freeze(model: TwoTower, options: TrainOptions) -> None:
    if options.recipe == "denoiser":
        if options.is_tied:
            model.tie_towers()
        _choose_trained(model, options)


def _choose_trained(model: TwoTower, options: TrainOptions) -> None:
    """Freeze what the options do not train: by default the whole context side."""
    model.context_tower.requires_grad_(options.is_tied or options.train_context)
    if not model.config.tie_word_embeddings:  # such a head is the embeddings, trained as they are
        model.context_lm_head.requires_grad_(options.next_token_weight > 0.0)


def _towers(recipe: Recipe) -> Literal["both", "context"]:
    return "context" if recipe == "backbone" else "both"
