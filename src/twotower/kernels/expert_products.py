"""Products of tokens with the matrices of their experts in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.quantised import Matrices, linear


def grouped_mlp(x: Tensor, up: Matrices, down: Matrices, experts: Tensor) -> Tensor:
    """relu2 MLPs of several experts on tokens sorted by expert.

    x (tokens, D); up (E, F, D); down (E, D, F), or E matrices of any precision; experts (tokens,):
    whose each token is. Returns (tokens, D). Matrices of experts without tokens are not touched.
    """
    if (
        isinstance(up, Tensor)
        and isinstance(down, Tensor)
        and can_group(up)
        and x.dtype == up.dtype
    ):
        return grouped_products(x, up, down, experts)
    counts = torch.bincount(experts, minlength=len(up)).tolist()
    pieces = torch.split(x, counts)
    return torch.cat(
        [
            linear(F.relu(linear(piece, up[expert])).square(), down[expert])
            for expert, piece in enumerate(pieces)
            if len(piece)
        ]
    )


def can_group(weight: Tensor) -> bool:
    """Whether one launch makes the products with all of the matrices (E, N, K), so that the host
    need not know how many tokens each has: PyTorch's kernel is for bfloat16, rows of whole 16 bytes
    and Hopper or newer GPUs.
    """
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    is_aligned = all(size % 8 == 0 for size in weight.shape[1:])
    return is_aligned and torch.cuda.get_device_capability(weight.device) >= (9, 0)


def grouped_products(x: Tensor, up: Tensor, down: Tensor, experts: Tensor) -> Tensor:
    """`grouped_mlp` as two grouped products, of stacked matrices in x's dtype."""
    every = torch.arange(len(up), device=x.device)
    ends = torch.searchsorted(experts, every, right=True).int()  # of each expert's tokens
    inner = F.relu(torch._grouped_mm(x, up.mT, offs=ends)).square()
    y: Tensor = torch._grouped_mm(inner, down.mT, offs=ends)
    return y
