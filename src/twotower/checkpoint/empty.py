"""A model without values: on the meta device for its shapes, then in the memory of its devices."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from twotower.checkpoint import names
from twotower.config import TwoTowerConfig
from twotower.model.precision import Scheme, quantise_modules
from twotower.model.two_tower import TwoTower

Towers = Literal["both", "context", "denoiser"]


def build_empty(config: TwoTowerConfig, towers: Towers, scheme: Scheme | None = None) -> TwoTower:
    """The shapes of a model, in full precision or quantised, without memory or values."""
    with torch.device("meta"), _NoInitialisation():
        model = TwoTower(config, "context" if towers == "context" else "both")
        if scheme is not None:
            quantise_modules(model, scheme)
        return model


def count_parameters(model: TwoTower) -> int:
    """Weights of a model, whatever their precision and wherever they lie; tied ones count once."""
    full = build_empty(model.config, "context" if model.denoiser_tower is None else "both")
    return sum(parameter.numel() for parameter in full.parameters())


class _NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it has no effect but loads the compiler, a second."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def allocate(
    model: TwoTower,
    dtypes: tuple[torch.dtype, torch.dtype],
    devices: tuple[torch.device, torch.device],
    parts: str | tuple[str, ...] = "",
    unread: Collection[str] = (),
    own: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Give every parameter and buffer memory on its device, without values.

    parts: how the names of those begin that are wanted; the others stay on the meta device, and so
    do those named in `unread`. own: the dtype of some that have another one.
    """
    wanted = [(n, part) for n, part in model.named_children() if f"{n}.".startswith(parts)]
    for name, part in wanted:
        side = int(f"{name}.".startswith(names.DENOISER_PARTS))
        try:
            for module_name, module in part.named_modules(prefix=name):
                _allocate_own(module, f"{module_name}.", dtypes[side], devices[side], unread, own)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{name} does not fit into the memory of {devices[side]} ({reason}); use a smaller "
                "dtype, another device, or the context tower alone"
            ) from None
    model.tie_heads()


def _allocate_own(
    module: nn.Module,
    prefix: str,
    dtype: torch.dtype,
    device: torch.device,
    unread: Collection[str],
    own: Mapping[str, torch.dtype],
) -> None:
    for name, old in [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]:
        if prefix + name in unread:
            continue
        kept = old.dtype if names.keeps_dtype(prefix + name) else own.get(prefix + name, dtype)
        values = torch.empty(old.shape, dtype=kept, device=device)
        if isinstance(old, nn.Parameter):
            values = nn.Parameter(values, requires_grad=old.requires_grad)
        setattr(module, name, values)
