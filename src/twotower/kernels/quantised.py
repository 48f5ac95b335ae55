"""Matrices of 8 or 4 bits a number: their layout, and products with them.

Decides how numbers are packed and in which steps a product is computed; which matrices are packed
is the business of others. A CPU dequantises a piece at a time, so that no matrix is copied whole.
"""

from functools import cache
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[8, 4]
_MAX_INT8 = 127
_PIECE = 2**19  # numbers that a CPU dequantises at a time: they stay in a core's cache
_FEW_TOKENS = 16  # up to here torch's bfloat16 kernel is the faster one
_SMALLEST = 1e-30  # scale of a token that is all zero
_EXACT = 1024  # products of bytes whose sum float32 holds exactly


class Quantised(NamedTuple):
    """A matrix (N, K), or E of them with leading E, in groups of K/g numbers with a scale each.

    8 bits: qdata int8 (N, K), scale (N, 1): qdata * scale. 4 bits: qdata uint8 (N, K/2), byte j
    holds columns j (low) and j + K/2, scale, zero (N, K/g): (q - 8) * scale + zero.
    rounds_input: products with it round the other factor to 8 bits as well, a scale per token.
    """

    qdata: Tensor
    scale: Tensor
    zero: Tensor | None = None
    rounds_input: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), behind leading E."""
        *leading, columns = self.qdata.shape
        return (*leading, columns if self.zero is None else 2 * columns)


class Blocks(NamedTuple):
    """A matrix (N, K) as a GGUF file has it: data uint8 (N, bytes of a row), the name of the type,
    and K.
    """

    data: Tensor
    kind: str
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.data), self.width


# Of GGUF types the bytes of a block, and where its scales in half precision are.
_BLOCKS = {
    "Q8_0": (34, (0,)), "Q4_0": (18, (0,)), "Q4_1": (20, (0, 2)), "Q5_0": (22, (0,)),
    "Q5_1": (24, (0, 2)), "Q2_K": (84, (80, 82)), "Q3_K": (110, (108,)), "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,)), "IQ4_NL": (18, (0,)), "IQ4_XS": (136, (0,)),
    "MXFP4": (17, ()),
}  # fmt: skip
BLOCK_TYPES = tuple(_BLOCKS)
"""The types of `Blocks`."""


def bytes_a_number(kind: str) -> float:
    """What a number of such a type takes in a file."""
    return _BLOCKS[kind][0] / (256 if kind.endswith(("_K", "_XS")) else 32)


def scales_of(matrix: Blocks) -> Tensor:
    """The scales of all blocks, float16, zeros beside them: finite where all its numbers are."""
    size, places = _BLOCKS[matrix.kind]
    blocks = matrix.data.view(-1, size)
    found = [torch.zeros(1, 2, dtype=torch.uint8)]
    found += [blocks[:, place : place + 2] for place in places]
    return torch.cat(found).view(torch.float16)


class Matrices(Protocol):
    """The matrices of E experts: a stacked tensor, a list, or anything that hands out one."""

    def __len__(self) -> int: ...

    def __getitem__(self, expert: int, /) -> Tensor | Quantised: ...


def to_eight_bits(weight: Tensor) -> Quantised:
    """A matrix (N, K) of any floating type, each row by its largest number, which becomes 127."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1, keepdim=True) / _MAX_INT8
    numbers = (weight * torch.where(scale > 0, 1 / scale, 0.0)).round().clamp(-_MAX_INT8, _MAX_INT8)
    qdata = numbers.nan_to_num(0.0).to(torch.int8)  # NaN stays in the scale
    return Quantised(qdata, scale)


def pack_halves(numbers: Tensor) -> Tensor:
    """Numbers 0..15 (..., K) of an even K -> two in each byte, uint8 (..., K/2)."""
    low, high = numbers.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def dequantise(matrix: Quantised, dtype: torch.dtype) -> Tensor:
    """The matrix (..., N, K) in a floating type."""
    qdata, scale, zero, _ = matrix
    if zero is None:
        return (qdata.to(dtype) * scale).to(dtype)
    half, (*_, groups) = qdata.shape[-1], scale.shape
    numbers = torch.empty(*qdata.shape[:-1], 2 * half, dtype=dtype, device=qdata.device)
    numbers[..., :half] = qdata & 15
    numbers[..., half:] = qdata >> 4
    lowest = (zero.float() - 8 * scale.float()).to(dtype).unsqueeze(-1)
    grouped = numbers.unflatten(-1, (groups, -1))
    return torch.addcmul(lowest, grouped, scale.to(dtype).unsqueeze(-1)).flatten(-2)


def linear(x: Tensor, weight: Tensor | Quantised, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight (N, K).T + bias in x's dtype, for a weight of any precision."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype), bias)
    tokens = x.reshape(-1, x.shape[-1])
    if weight.zero is not None:
        y = _times_four_bits(tokens, weight)
    elif weight.rounds_input:
        y = _times_rounded(tokens, weight)
    else:
        y = _times_eight_bits(tokens, weight)
    y = y.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y
    return y if bias is None else y + bias


def _rows_at_a_time(x: Tensor, weight: Quantised) -> int:
    return max(1, _PIECE // x.shape[1]) if x.device.type == "cpu" else len(weight.qdata)


def _times_four_bits(x: Tensor, weight: Quantised) -> Tensor:
    """x (tokens, K) -> (tokens, N)."""
    assert weight.zero is not None
    rows = _rows_at_a_time(x, weight)
    # A CPU dequantises twice as fast to float32 as to bfloat16.
    kind = torch.float32 if x.device.type == "cpu" else x.dtype
    parts = zip(*(part.split(rows) for part in weight[:3]), strict=True)  # type: ignore[union-attr]  # all three
    pieces = (dequantise(Quantised(*part), kind) for part in parts)
    return torch.cat([x.to(kind) @ piece.T for piece in pieces], dim=1).to(x.dtype)


def _times_eight_bits(x: Tensor, weight: Quantised) -> Tensor:
    """x (tokens, K) -> (tokens, N); the scale comes last, in float32."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) <= _FEW_TOKENS:
        ones = torch.ones(len(weight.qdata), dtype=x.dtype)
        y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight.qdata, ones)
    else:
        if x.dtype == torch.float16:  # whose range the sums of numbers up to 127 leave
            return _times_eight_bits(x.float(), weight).to(x.dtype)
        pieces = weight.qdata.split(_rows_at_a_time(x, weight))
        y = torch.cat([x @ piece.to(x.dtype).T for piece in pieces], dim=1)
    scaled: Tensor = y * weight.scale.squeeze(-1)
    return scaled.to(x.dtype)


def _times_rounded(x: Tensor, weight: Quantised) -> Tensor:
    """x (tokens, K) -> (tokens, N); integer sums are exact, whatever the other tokens."""
    step = (x.abs().amax(-1, keepdim=True).float() / _MAX_INT8).clamp_min(_SMALLEST)
    rounded = (x / step).round().to(torch.int8)
    sums = _sums_of_bytes(rounded, weight.qdata)
    return (sums * step * weight.scale.squeeze(-1)).to(x.dtype)


def _sums_of_bytes(x: Tensor, weight: Tensor) -> Tensor:
    """int8 (tokens, K), (N, K) -> int32 (tokens, N), exactly."""
    if x.device.type != "cpu" or _sums_are_exact():
        return torch._int_mm(x, weight.T)
    pairs = zip(x.split(_EXACT, dim=1), weight.split(_EXACT, dim=1), strict=True)
    sums = [(one.float() @ two.float().T).int() for one, two in pairs]
    return torch.stack(sums).sum(0, dtype=torch.int32)


@cache
def _sums_are_exact() -> bool:
    """Whether PyTorch's are here: without VNNI, oneDNN cuts sums of two products to 16 bits."""
    largest = torch.full((32, 64), _MAX_INT8, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.T) == 64 * _MAX_INT8**2).all())
