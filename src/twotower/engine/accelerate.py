"""Who runs a model's decoding passes: plain PyTorch, or one native call a pass."""

import logging
from typing import Literal, get_args

from twotower.model import TwoTower
from twotower.model.native import NativeTwoTower

Executor = Literal["auto", "eager", "native"]
EXECUTORS: tuple[Executor, ...] = get_args(Executor)
_log = logging.getLogger(__name__)


def accelerate(model: TwoTower, executor: Executor = "auto") -> TwoTower:
    """A model with the same methods, weights and, but for rounding, results.

    eager: the model itself. native: passes in C++, compiled on first use and kept in the user's
    cache; float32 and dense layers on a CPU. auto: native where it can be, else eager with one log
    line. The weights must not change afterwards. ValueError (one line) if native cannot be.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor={executor!r} is unknown; use one of {', '.join(EXECUTORS)}")
    if executor == "eager":
        return model
    try:
        native = NativeTwoTower(model)
    except (ValueError, OSError) as error:
        if executor == "native":
            raise ValueError(f"executor=native: {error}; use executor=eager") from None
        _log.info("executor=eager: %s", error)
        return model
    _log.info("executor=native")
    return native
