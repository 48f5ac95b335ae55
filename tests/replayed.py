"""Recordings without a GPU: the operations of a pass, noted once and run again on the same memory.

As with a CUDA graph, nothing of Python runs again, results appear where those of the first run
were, and a pass that asks the host for a number, or gets one from it, cannot be recorded.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from twotower import TwoTower, accelerate
from twotower.diffusion import sampling
from twotower.graphs import backend
from twotower.kernels import expert_products
from twotower.layers import bigram

# What a host must know before it can go on: values, or how large a result is.
_QUESTIONS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique")


class Tape(TorchDispatchMode):
    """Notes operations as they run: what is called, with what, and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.name().removeprefix("aten::"), kwargs or {}
        places = args[1] if name.startswith("index.") else ()
        has_mask = any(place is not None and place.dtype == torch.bool for place in places)
        if has_mask or name.startswith(_QUESTIONS):
            _refuse()
        result = func(*args, **kwargs)
        if not func.is_view:  # one looks at memory that is written again
            self.calls.append((func, args, kwargs, _tensors(result)))
        return result


class Replayed:
    """What stands in for `twotower.graphs.arena.Recording`."""

    made = 0

    def __init__(self, function: Callable[[], Any], pool: object, device: torch.device) -> None:
        function()  # a GPU's libraries need it; a pass must bear it
        self._tape = Tape()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "cpu", "numpy"):  # no operation stands for these
                patch.setattr(Tensor, name, _refuse)
            patch.setattr(torch, "tensor", _refuse)
            with self._tape:
                self._outputs = function()
        type(self).made += 1

    def __call__(self) -> Any:
        for func, args, kwargs, results in self._tape.calls:
            for kept, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)
        return self._outputs


def _refuse(*_: object, **__: object) -> None:
    raise RuntimeError("the host asks for a tensor's values while a pass is recorded")


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def recording(model: TwoTower, patch: pytest.MonkeyPatch) -> TwoTower:
    """The model with passes as a GPU has them: recorded, experts without the host."""
    patch.setattr(backend, "Recording", Replayed)
    patch.setattr(expert_products, "can_group", lambda weight: True)
    patch.setattr(bigram, "masked_positions", lambda block, _: [True] * block.shape[1])
    patch.setattr(sampling, "argmax", lambda logits: logits.argmax(-1))
    patch.setattr(Replayed, "made", 0)
    found = accelerate(model, "graphs")
    patch.setattr(found.backend, "_pool", "a pool")
    return found
