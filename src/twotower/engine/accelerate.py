"""Who runs a model's decoding passes, plain PyTorch or one native call a pass, in which weights."""

import logging
from typing import Literal, get_args

from twotower.model import TwoTower
from twotower.model.context_tower import ContextTower
from twotower.model.native import NativeTwoTower

Executor = Literal["auto", "eager", "native"]
Weights = Literal["loaded", "int8"]
EXECUTORS: tuple[Executor, ...] = get_args(Executor)
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
_log = logging.getLogger(__name__)


def executor_of(model: TwoTower) -> Executor:
    """Who runs a loaded model's passes: native, or eager."""
    return "eager" if type(model.context_tower) is ContextTower else "native"


def accelerate(
    model: TwoTower, executor: Executor = "auto", weights: Weights = "loaded"
) -> TwoTower:
    """A model with the same methods, parameters and, but for rounding, results.

    eager: the model itself. native: passes in C++, compiled on first use and kept in the user's
    cache; float32 and dense layers on a CPU. auto: native where it can be, else eager with one log
    line. weights=int8: native passes whose projections are rounded to int8, now; there is no other
    way to run them. The parameters must not change afterwards. ValueError (one line) for what
    cannot be.
    """
    for name, value, known in (("executor", executor, EXECUTORS), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")
    is_int8 = weights == "int8"
    if executor == "eager":
        if is_int8:
            raise ValueError("weights=int8: eager passes run as loaded; use executor=native")
        return model
    try:
        native = NativeTwoTower(model, is_int8)
    except (ValueError, OSError) as error:
        if is_int8:
            raise ValueError(f"weights=int8: {error}; use weights=loaded") from None
        if executor == "native":
            raise ValueError(f"executor=native: {error}; use executor=eager") from None
        _log.info("executor=eager: %s", error)
        return model
    _log.info("executor=native weights=%s", weights)
    return native
