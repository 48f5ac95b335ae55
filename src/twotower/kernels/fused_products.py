"""Products with matrices of 8 bits as one Triton kernel: numbers are dequantised in registers.

A few tokens wait for weights to come from memory, and here half as many bytes come. The kernel adds
up in one order whatever the other tokens are, so a draft is verified as a step would compute it.
Needs triton: import it where `graphs.backend.fused_refusal` gives no reason against it.
"""

from typing import TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels import expert_products, quantised
from twotower.kernels.expert_products import activation
from twotower.kernels.quantised import Matrices, Quantised

MAX_TOKENS = 64  # with more, dequantising the matrix first takes less time
TILE_TOKENS = 16  # the least that a tensor core multiplies
# Rows and bytes of x's columns at a time: 8 KiB of numbers, of which a program has three on their
# way, and as much of x as lies in an ordinary GPU's shared memory.
TILES = (16, 1024), (32, 512)
_MANY_ROWS = 1 << 13  # from here on the larger number of rows keeps a large GPU busy, too


@triton.jit
def _whose(ends, tile, num_experts, TILE: tl.constexpr, BE: tl.constexpr):
    """The expert of a tile of tokens, which are sorted by expert, and its tokens [first, last)."""
    e = tl.arange(0, BE)
    end = tl.load(ends + e, e < num_experts, 0)
    start = tl.load(ends + e - 1, (e > 0) & (e < num_experts), 0)
    tiles = (end - start + TILE - 1) // TILE
    until = tl.cumsum(tiles, 0)
    is_own = (until - tiles <= tile) & (tile < until)
    first = tl.sum(tl.where(is_own, start + (tile - until + tiles) * TILE, 0), 0)
    return tl.sum(tl.where(is_own, e, 0), 0), first, tl.sum(tl.where(is_own, end, 0), 0)


@triton.jit
def _product(
    x, qdata, scale, ends, out, num_tokens, num_experts, x_stride, N, K,
    GROUPED: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Some outputs of a tile of tokens: (BN, BM), the weights in front, where they may come from
    registers."""
    expert, first, last = 0, tl.program_id(0) * BM, num_tokens
    if GROUPED:
        expert, first, last = _whose(ends, tl.program_id(0), num_experts, BM, BE)
    if first >= last:
        return
    m, n = first + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    has_m, has_n = m < last, n < N
    row = (expert * N + n).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    sums = tl.zeros((BN, BM), tl.float32)
    for at in range(0, K, BK):
        k = at + tl.arange(0, BK)
        w = tl.load(qdata + row[:, None] * K + k[None, :], has_n[:, None] & (k < K)[None, :], 0)
        v = tl.load(x + m[None, :] * x_stride + k[:, None], has_m[None, :] & (k < K)[:, None], 0.0)
        sums = tl.dot(w.to(dtype), v, sums, input_precision="ieee")
    sums = sums * tl.load(scale + row, has_n, 0.0)[:, None]
    places = m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(out + places, sums.to(dtype), has_n[:, None] & has_m[None, :])


def is_fused(matrix: object) -> TypeGuard[Quantised]:
    """Whether the kernel is for it: weights of 8 bits beside tokens that keep their own."""
    return isinstance(matrix, Quantised) and matrix.zero is None and not matrix.rounds_input


def product(
    x: Tensor, matrix: Quantised, ends: Tensor | None = None, tile: tuple[int, int] | None = None
) -> Tensor:
    """x (tokens, K) times a matrix (N, K) -> (tokens, N), in x's dtype.

    With ends (E,), int32, of E matrices (E, N, K) expert e's is for the tokens before ends[e] and
    behind those of the expert before. One rounding, of the sum in float32 times its scale.
    tile: as in TILES; chosen by the matrix where not given, never by the number of tokens.
    """
    (num_tokens, columns), (*experts, num_rows, _) = x.shape, matrix.qdata.shape
    x, count = x if x.stride(1) == 1 else x.contiguous(), experts[0] if experts else 1
    tiles = -(-num_tokens // TILE_TOKENS)
    if ends is not None:  # every expert that has tokens may have one tile that is not full
        tiles = num_tokens // TILE_TOKENS + min(count, num_tokens)
    out = x.new_empty(num_tokens, num_rows)
    rows_at_once, bytes_at_once = tile or TILES[num_rows >= _MANY_ROWS]
    _product[tiles, triton.cdiv(num_rows, rows_at_once)](
        x, matrix.qdata, matrix.scale, x if ends is None else ends, out, num_tokens, count,
        x.stride(0), num_rows, columns, GROUPED=ends is not None,
        BE=triton.next_power_of_2(count), BM=TILE_TOKENS, BN=rows_at_once, 
        BK=bytes_at_once // x.element_size(), num_stages=4,
    )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor | Quantised, bias: Tensor | None = None) -> Tensor:
    """`quantised.linear`; PyTorch's for other matrices and for more than 64 tokens."""
    tokens = x.reshape(-1, x.shape[-1])
    if not is_fused(weight) or len(tokens) > MAX_TOKENS:
        return quantised.linear(x, weight, bias)
    y = product(tokens, weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def grouped_mlp(
    x: Tensor, up: Matrices, down: Matrices, experts: Tensor, gate: Matrices | None = None
) -> Tensor:
    """`expert_products.grouped_mlp`, for any number of tokens; PyTorch's for other matrices."""
    first, last, gating = (getattr(one, "matrix", None) for one in (up, down, gate))
    if not (is_fused(first) and is_fused(last)):
        return expert_products.grouped_mlp(x, up, down, experts, gate)
    every = torch.arange(len(up), device=x.device)
    ends = torch.searchsorted(experts, every, right=True).int()
    gated = None
    if gate is not None:
        assert is_fused(gating)  # as the other matrix of its shape is
        gated = product(x, gating, ends)
    return product(activation(product(x, first, ends), gated), last, ends)
