"""One model on many processes: what of it each holds, and what is kept of its activations.

Applied from outside; model code knows nothing of it. Every matrix of a layer, every stack of
experts, embedding and head is a unit of its own (FSDP2): sharded by rows over all processes,
gathered while it is used, its gradient added up and sharded again. What is small is one last unit.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from twotower.model.layer import Layer
from twotower.model.two_tower import TwoTower

_Module = TypeVar("_Module", bound=nn.Module)
# What a loss calls.
_ENTRIES = ("context_logits", "training_logits", "joint_logits", "read_blocks", "draft_logits")


def shard(model: TwoTower, mesh: DeviceMesh, is_narrow: bool) -> None:
    """Leave every process its rows of all parameters, frozen ones too.

    is_narrow: matrices travel in bfloat16, those that autocast rounds to it anyway, so that no
    result changes; norms, scan parameters, routers, embeddings and all gradients stay float32.
    """
    matrices = MixedPrecisionPolicy(cast_forward_inputs=False)
    if is_narrow:
        matrices = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    for unit in _units(model):
        policy = wide if isinstance(unit, nn.Embedding) else matrices
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    # Sharded again after each forward pass too: the average's weights may come next.
    fully_shard(model, mesh=mesh, mp_policy=wide, reshard_after_forward=True)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        # Gradients are added up, not averaged: losses are divided by the tokens of all processes.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in _ENTRIES:
        register_fsdp_forward_method(model, name)


def _units(model: TwoTower) -> Iterator[nn.Module]:
    """Modules to gather one by one. Those that share a parameter with another are none of them:
    they stay with the rest, gathered for the whole step.
    """
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    matrices = [part for layer in each(model, Layer) for part in layer.matrices()]
    heads = [part for name, part in model.named_children() if name.endswith("lm_head")]
    for module in [*each(model, nn.Embedding), *matrices, *heads]:
        if all(owners[id(parameter)] == 1 for parameter in module.parameters()):
            yield module


def each(model: nn.Module, kind: type[_Module]) -> list[_Module]:
    """The modules of one kind, with their type."""
    return [module for module in model.modules() if isinstance(module, kind)]


def recompute_mixers(model: TwoTower) -> None:
    """Keep of every mixer only its input; the backward pass computes the rest again."""
    for layer in each(model, Layer):
        checkpoint(layer.mixer)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale gradients to a norm of `limit` at most (0: any); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(parameters, limit or math.inf, norm)
    return norm.item()


def whole(value: Tensor) -> Tensor:
    """A tensor with all its rows, on every process."""
    full: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return full


@torch.no_grad()
def hand_out(values: Mapping[str, Tensor] | None, into: Mapping[str, Tensor]) -> None:
    """Fill `into`, sharded or not, from the first process, which alone has `values`."""
    for name, target in into.items():
        if values is None:
            source = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        else:
            source = values[name].detach().to(target.device, target.dtype)
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(source, target.device_mesh, target.placements))
        else:
            dist.broadcast(source, src=0)
            target.copy_(source)
