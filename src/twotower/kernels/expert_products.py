"""Products of tokens with the matrices of their experts in plain PyTorch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.quantised import Matrices, linear

GroupedMLP = Callable[[Tensor, Matrices, Matrices, Tensor, Matrices | None], Tensor]
"""`grouped_mlp`, or what computes the same."""


def grouped_mlp(
    x: Tensor, up: Matrices, down: Matrices, experts: Tensor, gate: Matrices | None = None
) -> Tensor:
    """MLPs of several experts on tokens sorted by expert: relu2, or gated by a SiLU.

    x (tokens, D); up (E, F, D); down (E, D, F), or E matrices of any precision; experts (tokens,):
    whose each token is; gate: as up, None for relu2. Returns (tokens, D). Matrices of experts
    without tokens are not touched.
    """
    if (
        isinstance(up, Tensor)
        and isinstance(down, Tensor)
        and can_group(up)
        and x.dtype == up.dtype
    ):
        assert gate is None or isinstance(gate, Tensor)  # all are stacked alike
        return grouped_products(x, up, down, experts, gate)
    chosen, counts = torch.unique_consecutive(experts, return_counts=True)
    found = []
    for expert, piece in zip(chosen.tolist(), torch.split(x, counts.tolist()), strict=True):
        gated = None if gate is None else linear(piece, gate[expert])
        found.append(linear(activation(linear(piece, up[expert]), gated), down[expert]))
    return torch.cat(found)


def activation(up: Tensor, gate: Tensor | None) -> Tensor:
    """What a down projection gets: relu(up)^2, or silu(gate) up where there is a gate."""
    return F.relu(up).square() if gate is None else F.silu(gate) * up


def can_group(weight: Tensor) -> bool:
    """Whether one launch makes the products with all of the matrices (E, N, K), so that the host
    need not know how many tokens each has: PyTorch's kernel is for bfloat16, rows of whole 16 bytes
    and Hopper or newer GPUs.
    """
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    is_aligned = all(size % 8 == 0 for size in weight.shape[1:])
    return is_aligned and torch.cuda.get_device_capability(weight.device) >= (9, 0)


def grouped_products(
    x: Tensor, up: Tensor, down: Tensor, experts: Tensor, gate: Tensor | None = None
) -> Tensor:
    """`grouped_mlp` as grouped products, of stacked matrices in x's dtype."""
    every = torch.arange(len(up), device=x.device)
    ends = torch.searchsorted(experts, every, right=True).int()  # of each expert's tokens
    gated = None if gate is None else torch._grouped_mm(x, gate.mT, offs=ends)
    inner = activation(torch._grouped_mm(x, up.mT, offs=ends), gated)
    y: Tensor = torch._grouped_mm(inner, down.mT, offs=ends)
    return y
