"""The model at the start of a run and at its end: fresh, from a checkpoint, empty, exported.

Decides its vocabulary and special tokens: those of the data's tokenizer. A model may have more ids
than the tokenizer, which pad it; the mask token is one of these where the tokenizer has none.
"""

import logging
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from twotower.checkpoint import describe, load_checkpoint, resolve, save_backbone, save_two_towers
from twotower.checkpoint.denoiser import load_denoiser, save_denoiser, with_new_denoiser
from twotower.checkpoint.empty import allocate, build_empty
from twotower.config import DraftSpec, TwoTowerConfig
from twotower.families import config_from_dict, config_to_dict, read_config
from twotower.model.initialise import randomise, remove_conditioning
from twotower.model.precision import require_plain
from twotower.model.thin import thin_config, trained_parameters
from twotower.model.two_tower import TwoTower
from twotower.tokenizer import TOKENIZER_FILE, load_tokenizer
from twotower.train.options import Recipe, TrainOptions
from twotower.train.presets import preset_config
from twotower.train.shard import Shard

Towers = Literal["both", "context"]
DEFAULT_PRESET = "small"
_log = logging.getLogger(__name__)


def starting_model(options: TrainOptions, shard: Shard) -> TwoTower:
    """The float32 model of a new run; what it trains, and only that, requires a gradient.

    ValueError (one line) if an initial checkpoint has another vocabulary than the data, or towers
    that differ where one is to be both.
    """
    if options.init is None:
        model = TwoTower(new_config(options, shard), _towers(options.recipe))
        randomise(model, options.seed)
    else:
        model = load_checkpoint(resolve(options.init, field="init"), towers=_towers(options.recipe))
        require_plain(model, "training")
        model = _with_tokens(model, options.init, shard)
        if options.recipe == "denoiser":
            model = _with_denoiser(model, options)
    _tie_and_freeze(model, options)
    return model


def empty_model(options: TrainOptions, config: TwoTowerConfig) -> TwoTower:
    """`starting_model` without values: memory that is not touched takes no room."""
    model = build_empty(config, _towers(options.recipe))
    allocate(model, (torch.float32, torch.float32), (torch.device("cpu"), torch.device("cpu")))
    _tie_and_freeze(model, options)
    return model


def new_config(options: TrainOptions, shard: Shard) -> TwoTowerConfig:
    """The configuration of a new backbone: the file's or the preset's, with the data's vocabulary
    and special tokens.
    """
    size = shard.meta.model_vocab_size
    if options.config is None:
        given = preset_config(options.preset or DEFAULT_PRESET, size)
    else:
        given = read_config(options.config)
    special, eos = shard.meta.special, shard.meta.special.eos
    return _replace(
        given,
        vocab_size=size,
        bos_token_id=special.bos,
        eos_token_id=list(eos),
        pad_token_id=special.pad,
        mask_token_id=shard.meta.mask_id,
    )


def export(model: TwoTower, path: Path, options: TrainOptions, shard: Shard) -> None:
    """Write the trained model with its tokenizer: the backbone layout, or both towers; of a thin
    denoiser, what the backbone does not have.
    """
    if model.config.draft is not None:
        assert options.init is not None
        return save_denoiser(
            model, path, options.init.name if options.init.exists() else str(options.init)
        )
    save = save_backbone if options.recipe == "backbone" else save_two_towers
    return save(model, path, extra_files=shard.tokenizer.files())


def _with_tokens(model: TwoTower, init: Path, shard: Shard) -> TwoTower:
    """The initial checkpoint with the special tokens of the data, and an id for the mask."""
    _check_tokenizer(init, model.config.vocab_size, shard)
    special, known = shard.meta.special, shard.tokenizer.special_ids
    mask = _mask_id(model.config, init, shard)
    eos = [*special.eos, *(set(model.config.eos_token_ids) & known - {*special.eos})]
    pad = model.config.pad_token_id if model.config.pad_token_id in known else None
    # A mask one past the last id is the denoiser's own and takes no row of the vocabulary.
    model = _with_vocabulary(model, max(model.config.vocab_size, mask))
    model.config = _replace(
        model.config,
        bos_token_id=special.bos,
        eos_token_id=sorted(eos),
        pad_token_id=pad if special.pad is None else special.pad,
        mask_token_id=mask,
    )
    return model


def _check_tokenizer(init: Path, vocab_size: int, shard: Shard) -> None:
    """ValueError if the data were made with another tokenizer than the checkpoint's."""
    size, folder = shard.meta.vocab_size, resolve(init)
    remedy = "prepare the data with the model's tokenizer"
    if vocab_size < size:
        raise ValueError(
            f"data: its vocabulary has {size} tokens, the model's {vocab_size}; {remedy}"
        )
    if not (folder / TOKENIZER_FILE).is_file():
        if vocab_size > size:
            _log.warning("%s has %d ids, the data's tokenizer %d", init, vocab_size, size)
    elif load_tokenizer(folder).fingerprint != shard.meta.tokenizer_sha256:
        raise ValueError(f"data: {shard.folder} has another tokenizer than {init}; {remedy}")


def _mask_id(config: TwoTowerConfig, init: Path, shard: Shard) -> int:
    """The mask token of a run from a checkpoint: a denoiser's own, or the data's, or padding."""
    named = shard.meta.special.mask
    files = describe(init).files
    if files is not None and files.layout == "two-tower":
        if named not in (None, config.mask_token_id):
            raise ValueError(
                f"mask_token: {named} in the data, {config.mask_token_id} in the denoiser of "
                f"{init}; prepare the data with its tokenizer and no other mask token"
            )
        return config.mask_token_id
    is_padding = named is None and config.mask_token_id >= shard.meta.vocab_size
    return config.mask_token_id if is_padding else shard.meta.mask_id


def _with_vocabulary(model: TwoTower, size: int) -> TwoTower:
    """The model with `size` ids. New rows are the mean of all: such a logit is never the largest,
    and its token less probable than the average one.
    """
    if size == model.config.vocab_size:
        return model
    towers: Towers = "context" if model.denoiser_tower is None else "both"
    larger = TwoTower(_replace(model.config, vocab_size=size), towers)
    shapes = {name: tensor.shape for name, tensor in larger.state_dict().items()}
    larger.load_state_dict(
        {name: _extended(values, shapes[name]) for name, values in model.state_dict().items()}
    )
    return larger


def _extended(values: Tensor, shape: torch.Size) -> Tensor:
    if values.shape == shape:
        return values
    more = values.mean(0, keepdim=True).expand(shape[0] - len(values), *shape[1:])
    return torch.cat([values, more])


def _replace(config: TwoTowerConfig, **values: object) -> TwoTowerConfig:
    return config_from_dict(config_to_dict(config) | values)


def _with_denoiser(model: TwoTower, options: TrainOptions) -> TwoTower:
    """The initial checkpoint with the denoiser and the configuration that the options ask for."""
    if options.reads is not None:
        size = options.block_size or model.config.block_size
        draft = DraftSpec(bigram_rank=options.bigram_rank)
        config = thin_config(model.config, options.reads, size, draft)
        return with_new_denoiser(model, config, None, options.seed)
    if options.denoiser is not None:
        made = load_denoiser(model, options.denoiser)
        if made.draft_ids is not None:
            raise ValueError(
                f"denoiser: {options.denoiser} drafts a part of the vocabulary; train it on with "
                "twotower adapt"
            )
        return made
    if options.is_tied and not _are_equal(model):
        raise ValueError(
            f"towers: {options.towers} needs one tower, but the two of {options.init} differ; give "
            "a backbone, or a model that was trained tied"
        )
    config = model.config.replace(
        block_size=options.block_size or model.config.block_size,
        bidirectional_mamba=options.bidirectional_mamba or model.config.bidirectional_mamba,
    )
    weights, shaped = model.state_dict(), TwoTower(config)
    if shaped.denoiser().mask_embedding is None:  # the data name a mask, in the vocabulary
        weights.pop("denoiser_tower.mask_embedding", None)
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
    if model.config.draft is not None:
        trained_parameters(model)
    elif options.recipe == "denoiser":
        if options.is_tied:
            tie_towers(model)
        _choose_trained(model, options)


def tie_towers(model: TwoTower) -> None:
    """Let the denoiser tower be the context tower's weights; heads and conditioning stay apart."""
    own, shared = model.denoiser().modules(), model.context_tower.modules()
    for module, source in zip(own, shared, strict=True):
        for name, parameter in source.named_parameters(recurse=False):
            setattr(module, name, parameter)
        for name, buffer in source.named_buffers(recurse=False):
            setattr(module, name, buffer)
    model.tie_heads()


def _choose_trained(model: TwoTower, options: TrainOptions) -> None:
    """Freeze what the options do not train: by default the whole context side."""
    model.context_tower.requires_grad_(options.is_tied or options.train_context)
    if not model.config.tie_word_embeddings:  # such a head is the embeddings, trained as they are
        model.context_lm_head.requires_grad_(options.next_token_weight > 0.0)


def _towers(recipe: Recipe) -> Towers:
    return "context" if recipe == "backbone" else "both"
