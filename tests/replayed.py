"""Recordings without a GPU: the operations of a pass, traced once and run again on the same memory.

As with a CUDA graph, nothing of Python runs again, results appear where those of the first run
were, and a pass that asks the host for a number cannot be recorded.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from twotower import TwoTower, accelerate
from twotower.graphs import backend
from twotower.kernels import ops
from twotower.layers import bigram


class Replayed:
    """What stands in for `twotower.graphs.arena.Recording`."""

    made = 0

    def __init__(self, function: Callable[[], Any], pool: object, device: torch.device) -> None:
        for _ in range(2):
            function()
        leaves, self._shape = _pytree.tree_flatten(function())
        self._is_tensor = [leaf is not None for leaf in leaves]  # the rest: layers without a state
        self._outputs = [leaf for leaf in leaves if leaf is not None]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "cpu"):
                patch.setattr(Tensor, name, _refuse)  # other questions the tracer refuses itself
            self._traced = make_fx(lambda: _tensors(function()))()
        type(self).made += 1

    def __call__(self) -> Any:
        for kept, new in zip(self._outputs, self._traced(), strict=True):
            if (
                kept.data_ptr() != new.data_ptr() and 0 not in kept.stride()
            ):  # not a weight or input
                kept.copy_(new)
        parts = iter(self._outputs)
        leaves = [next(parts) if is_tensor else None for is_tensor in self._is_tensor]
        return _pytree.tree_unflatten(leaves, self._shape)


def _refuse(self: Tensor) -> None:
    raise RuntimeError("the host asks for a tensor's values while a pass is recorded")


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(values) if leaf is not None]


def recording(model: TwoTower, patch: pytest.MonkeyPatch) -> TwoTower:
    """The model with passes as a GPU has them: recorded, experts without the host."""
    patch.setattr(backend, "Recording", Replayed)
    patch.setattr(ops, "can_group", lambda weight: True)
    patch.setattr(bigram, "masked_places", lambda block, _: [True] * block.shape[1])
    patch.setattr(Replayed, "made", 0)
    found = accelerate(model, "graphs")
    patch.setattr(found.backend, "_pool", "a pool")
    return found
