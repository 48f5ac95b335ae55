"""What values the options of training may have, by field, from Python, TOML or JSON."""

import math
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

from twotower.arguments import (
    A_SWITCH,
    ABOVE_ZERO,
    COUNT,
    INDEX,
    SHARE,
    THREADS,
    Problem,
    check,
    each,
    instance,
    number,
    one_of,
)
from twotower.paths import a_path
from twotower.specs import MAX_LAYERS
from twotower.tokenizer.training import MIN_VOCAB_SIZE
from twotower.train.presets import PRESET_NAMES

_fraction = number(0, 1, is_below=True)
_CHECKS: dict[str, Problem] = {
    "preset": one_of(*PRESET_NAMES),
    **dict.fromkeys(("decay_fraction", "final_lr_ratio", "unaligned_row_fraction"), SHARE),
    **dict.fromkeys(("fully_masked_fraction", "first_token_visible_fraction"), SHARE),
    "early_fraction": number(0, 1, is_above=True, is_below=True),
    "ema_decay": _fraction,
    "betas": each(_fraction, 2),
    **dict.fromkeys(("learning_rate", "loss_decay"), ABOVE_ZERO),
    "reads": each(number(0, MAX_LAYERS - 1, is_whole=True)),
    "bigram_rank": number(0, 1024, is_whole=True),
    "vocab_size": number(MIN_VOCAB_SIZE, is_whole=True),
    "sequence_length": number(2, is_whole=True),
    **dict.fromkeys(("batch_size", "accumulate", "steps", "block_size"), COUNT),
    "threads": THREADS,
    **dict.fromkeys(("denoised_blocks_per_row", "early_block_size", "eval_rows"), COUNT),
    **dict.fromkeys(("checkpoint_every", "keep_checkpoints", "log_every"), COUNT),
    **dict.fromkeys(("peer_timeout_s", "tokens", "tokenizer_documents", "align"), COUNT),
    **dict.fromkeys(("warmup_steps", "eval_every", "shuffle", "seed"), INDEX),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), number(0)),
    **dict.fromkeys(("load_balance_rate", "ar_loss_weight"), number(0)),
}


_KINDS = {bool: A_SWITCH, str: instance(str, "text"), Path: a_path}


def checked(name: str, value: object, hint: object) -> object:
    """A plain value as the type that its field wants; ValueError (one line) if it cannot be."""
    is_optional = NoneType in get_args(hint)
    if is_optional:
        (hint,) = set(get_args(hint)) - {NoneType}
    value = _converted(value, hint)
    if value is not None or not is_optional:
        check({name: value}, {name: _CHECKS.get(name) or _check_of(hint)})
    return value


def _converted(value: object, hint: object) -> object:
    """Text as a path, a list as a tuple, a whole number as a float, where the type says so."""
    if isinstance(value, list | tuple) and get_origin(hint) is tuple:
        return tuple(_converted(part, get_args(hint)[0]) for part in value)
    if isinstance(value, str) and hint is Path:
        return Path(value)
    if type(value) is int and hint is float:
        return float(value) if abs(value) < 1 << 1000 else math.inf
    return value


def _check_of(hint: object) -> Problem:
    """What a type says of a value."""
    if get_origin(hint) is Literal:
        return one_of(*get_args(hint))
    if get_origin(hint) is tuple:
        return each(_check_of(get_args(hint)[0]))
    assert isinstance(hint, type)
    return _KINDS[hint]
