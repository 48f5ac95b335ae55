"""A device that is no CPU, on every machine: its numbers lie in the CPU's memory, and mix with no
others.

PyTorch lets one kind of device be written in Python. A tensor on it refuses what a CUDA tensor
refuses: to meet a CPU tensor in one operation, to index one, and to be read as numpy's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "far"
aten = torch.ops.aten
_MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Far(Tensor):
    """A tensor on the device; `held` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Far":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # modules keep tied weights tied
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> "Far":
        return Far(inner["held"])

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Operations that make tensors, whose device is an argument."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return _run(func, args, kwargs or {})


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What PyTorch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _near(value: Tensor) -> Tensor:
    return value.held if isinstance(value, Far) else value


def _run(func, args, kwargs):  # type: ignore[no-untyped-def]
    """An operation on the numbers, and its result where a device would leave it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    device = kwargs.get("device")
    is_made_far = device is not None and torch.device(device).type == NAME
    may_mix = func in _MAY_MIX or (func in _INDEXED and isinstance(args[0], Far))
    if far and not may_mix and any(t.dim() > 0 for t in tensors if not isinstance(t, Far)):
        raise RuntimeError(f"{func}: tensors on the CPU and on another device")
    if is_made_far:
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(*tree_map_only(Tensor, _near, args), **tree_map_only(Tensor, _near, kwargs))
    if func is aten.copy_.default:
        return args[0]
    if not is_made_far and (not far or device is not None):
        return out
    own = {id(tensor.held): tensor for tensor in far}  # of operations in place
    return tree_map_only(Tensor, lambda t: own[id(t)] if id(t) in own else Far(t), out)


def _register() -> list[torch.library.Library]:
    """The device and what PyTorch calls without asking Python first, which lasts as long as it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    kernels = torch.library.Library("aten", "IMPL")

    def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        _near(target).copy_(_near(source))
        return target

    def empty(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def kernel(*sizes: list[int], dtype: torch.dtype | None = None, **_: object) -> Tensor:
            return Far(make(*sizes, dtype=dtype))

        return kernel

    kernels.impl("empty_strided", empty(torch.empty_strided), "PrivateUse1")
    kernels.impl("empty.memory_format", empty(torch.empty), "PrivateUse1")
    kernels.impl("_copy_from", copy, "PrivateUse1")
    autocast = torch.library.Library("_", "IMPL")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # casts nothing
    return [kernels, autocast]


_KERNELS = _register()  # before the first backward pass of the process, which counts the devices


@contextmanager
def far_device() -> Iterator[torch.device]:
    """The device, while it lasts; its tensors serve no longer."""
    listed = Tensor.tolist  # refused to subclasses
    with patch.object(Tensor, "tolist", lambda self: listed(_near(self))), _Mode():
        yield torch.device(NAME, 0)
