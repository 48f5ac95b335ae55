"""Matrices in int8: how they are rounded, and how products.h wants them to lie.

A row (one output) has one float32 scale and whole numbers from -127 to 127.
"""

import ctypes
import sys
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.quantised import Quantised

MOST = 127
_ROWS = 16  # of a block: the outputs of one vector
_QUAD = 4  # inputs that one instruction multiplies and adds
_LONGEST_ROW = 65_536  # inputs: 255 * 127 * this is still an int32
_HUGE_PAGE = 2**21
_MADV_HUGEPAGE = 14


def quantise(weight: Tensor) -> Quantised:
    """weight (N, K) of any float type, rounded to int8; its products round the tokens, too."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1, keepdim=True) / MOST
    numbers = (weight * torch.where(scale > 0, 1 / scale, 0.0)).round().clamp(-MOST, MOST)
    qdata = numbers.nan_to_num(0.0).to(torch.int8)  # NaN stays in the scale
    return Quantised(qdata, scale, rounds_input=True)


class Packed:
    """Matrices (N, K), rounded here or before, one behind the other; `addresses` by name.

    Each is blocks of 16 rows, [K/4][16][4] with zeros beyond K and rows, then a float32 scale and
    an int32 128 * sum of each row: the library's tokens are unsigned, 128 too large.
    """

    def __init__(self, matrices: Mapping[str, Tensor | Quantised]) -> None:
        sizes = {name: _num_bytes(matrix) for name, matrix in matrices.items()}
        self._buffer = _huge_pages(sum(sizes.values()))
        self.num_bytes = len(self._buffer)
        self.addresses: dict[str, int] = {}
        at = 0
        for name, matrix in matrices.items():
            place = self._buffer[at : at + sizes[name]]
            place.copy_(_pack(matrix))
            self.addresses[name] = place.data_ptr()
            at += sizes[name]


def _num_bytes(matrix: Tensor | Quantised) -> int:
    rows, width = (matrix if isinstance(matrix, Tensor) else matrix.qdata).shape
    if width > _LONGEST_ROW:
        raise ValueError(f"a row of {width} weights is too long for int8; at most {_LONGEST_ROW}")
    blocks = -(-rows // _ROWS)
    return blocks * _ROWS * (-(-width // _QUAD) * _QUAD + 8)


def _pack(matrix: Tensor | Quantised) -> Tensor:
    """One matrix's bytes (num_bytes,) int8."""
    quantised = quantise(matrix) if isinstance(matrix, Tensor) else matrix
    rows, width = quantised.qdata.shape
    numbers = F.pad(quantised.qdata, (0, -width % _QUAD, 0, -rows % _ROWS))
    scales = F.pad(quantised.scale.float().flatten(), (0, -rows % _ROWS))
    sums = 128 * numbers.sum(1, dtype=torch.int32)
    blocks = numbers.view(-1, _ROWS, numbers.shape[1] // _QUAD, _QUAD).transpose(1, 2)
    parts = (blocks.contiguous(), scales, sums.to(torch.int32))
    return torch.cat([part.flatten().view(torch.int8) for part in parts])


def _huge_pages(num_bytes: int) -> Tensor:
    """A buffer that begins at a huge page, where there are any: fewer addresses to look up."""
    buffer = torch.empty(num_bytes + _HUGE_PAGE, dtype=torch.int8)
    buffer = buffer[-buffer.data_ptr() % _HUGE_PAGE :][:num_bytes]
    if sys.platform == "linux":
        start, length = buffer.data_ptr(), num_bytes // _HUGE_PAGE * _HUGE_PAGE
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)  # a wish
    return buffer
