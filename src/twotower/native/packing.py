"""Matrices in int8 and int4 as integers.h wants them to lie; pack.h rounds full precision.

Matrices in a GGUF type keep its grid where that is int4's.

int8: a row (one output) has one float32 scale and whole numbers from -127 to 127. int4: a group of
32 numbers of a row has a scale and an offset in half precision and whole numbers from 0 to 15;
those of a checkpoint keep its bfloat16, and no number is rounded twice.
"""

import ctypes
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.quantised import Bits, Blocks, Quantised
from twotower.model.passes import UnreadMatrix
from twotower.native.layout import DTYPES, STORED
from twotower.native.library import library

GROUP = 32  # numbers of an int4 group, and of a token's group
_ROWS = 16  # of a block: the outputs of one vector
_QUAD = 4  # inputs that one instruction multiplies and adds
_MOST_READ = 2**28  # numbers in full precision at a time
_PIECE = 2**19  # numbers that are rounded at a time: they stay in a core's cache
_LONGEST_ROW = 65_536  # inputs: 255 * 127 * this is still an int32
_ZERO = 128  # of int8 bytes
_HUGE_PAGE = 2**21
_MADV_HUGEPAGE = 14


class Grouped(NamedTuple):
    """A matrix (N, K) in int4: numbers uint8 (N, K), scale and offset (N, K/32); a weight is
    number * scale + offset in float16, (number - 8) * scale + offset in bfloat16.
    """

    numbers: Tensor
    scale: Tensor
    offset: Tensor


def grouped(matrix: Quantised) -> Grouped:
    """The 4 bits of a checkpoint, whose groups are of 32 numbers or more."""
    qdata, scale, zero, _ = matrix
    assert zero is not None
    numbers = torch.cat([qdata & 15, qdata >> 4], dim=1)
    times = numbers.shape[1] // GROUP // scale.shape[1]
    return Grouped(numbers, *(part.repeat_interleave(times, dim=1) for part in (scale, zero)))


class Packed:
    """Matrices (N, K), rounded here or before, one behind the other; `addresses` by name. Those of
    E experts (E, N, K) lie so, too.

    bits: what full precision is rounded to, 8 where not given. groups: columns of which a token has
    one scale, 32 or, where a checkpoint's `rounds_input` says how tokens are rounded, all of a row.
    centred: those whose 4 bits are a checkpoint's. unread: those without memory.
    Blocks of 16 rows, with zeros beyond the last. int8: bytes [K/4][16][4], 128 too large, and
    behind all blocks a float32 scale of each row. int4: for each group [4][16][4] bytes, of which
    number i of four has column 4 i + j low and 16 + 4 i + j high, then 16 scales and 16 offsets.
    """

    def __init__(
        self,
        matrices: Mapping[str, Tensor | Quantised],
        bits: Mapping[str, Bits] | None = None,
        unread: Mapping[str, UnreadMatrix] = MappingProxyType({}),
    ) -> None:
        self.centred = {
            name
            for name, one in matrices.items()
            if isinstance(one, Quantised) and one.zero is not None
        }
        self.bits: dict[str, Bits] = {
            name: 4 if name in self.centred else (bits or {}).get(name, 8) for name in matrices
        }
        sizes = {name: _num_bytes(one, self.bits[name]) for name, one in matrices.items()}
        self._buffer = _huge_pages(sum(sizes.values()))
        self.num_bytes = len(self._buffer)
        self.groups = {name: _token_group(matrix) for name, matrix in matrices.items()}
        parts = dict(zip(matrices, self._buffer.split([*sizes.values()]), strict=True))
        self.addresses = {name: part.data_ptr() for name, part in parts.items()}
        workers, threads = _share_out(matrices)

        def fill(name: str) -> None:
            each = _each(unread[name] if name in unread else matrices[name])
            for index, part in enumerate(parts[name].chunk(len(each))):
                _write(part, each[index], self.bits[name], threads)

        with ThreadPoolExecutor(workers) as pool:
            try:
                deque(pool.map(fill, matrices), maxlen=0)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # who presses ^C does not wait for the rest
                raise


def _share_out(matrices: Mapping[str, Tensor | Quantised]) -> tuple[int, int]:
    """How many matrices are read and packed at a time, and by how many threads each: as many as
    PyTorch has, while that many full-precision copies of the largest are a gigabyte at most.
    """
    threads = torch.get_num_threads()
    largest = max((math.prod(one.shape[-2:]) for one in matrices.values()), default=1)
    workers = max(1, min(threads, len(matrices), _MOST_READ // largest))
    return workers, threads // workers


def _each(
    matrix: Tensor | Quantised | UnreadMatrix,
) -> Sequence[Tensor | Quantised] | Tensor | UnreadMatrix:
    """The matrices of a stack, or the one that is none."""
    if isinstance(matrix, Tensor):
        return [matrix] if matrix.dim() == 2 else matrix
    if not isinstance(matrix, Quantised):
        return matrix
    qdata, scale, zero, rounds_input = matrix
    if qdata.dim() == 2:
        return [matrix]
    return [
        Quantised(
            qdata[expert], scale[expert], zero if zero is None else zero[expert], rounds_input
        )
        for expert in range(len(qdata))
    ]


def _token_group(matrix: Tensor | Quantised) -> int:
    if isinstance(matrix, Quantised) and matrix.rounds_input:
        return matrix.qdata.shape[-1]
    return GROUP


def _num_bytes(matrix: Tensor | Quantised, bits: Bits) -> int:
    *stack, rows, width = matrix.shape
    if width > _LONGEST_ROW:
        raise ValueError(f"a row of {width} weights is too long for int8; at most {_LONGEST_ROW}")
    rows = -(-rows // _ROWS) * _ROWS
    rows *= math.prod(stack)
    if bits == 4:
        return rows * (width // GROUP) * (GROUP // 2 + 4)
    return rows * (-(-width // _QUAD) * _QUAD + 4)


def _write(part: Tensor, matrix: Tensor | Quantised | Blocks, bits: Bits, threads: int) -> None:
    """One matrix's bytes (num_bytes,) int8; full precision is rounded."""
    if isinstance(matrix, Quantised):
        _write_quantised(part, matrix, bits)
        return
    if isinstance(matrix, Blocks):
        values, kind = matrix.data.contiguous(), STORED.index(matrix.kind)
    else:
        values = matrix.detach().contiguous()
        values = values if values.dtype in DTYPES else values.float()
        kind = DTYPES.index(values.dtype)
    library().twotower_pack(
        values.data_ptr(), kind, *matrix.shape, bits == 4, threads, part.data_ptr()
    )


def _write_quantised(part: Tensor, matrix: Quantised, bits: Bits) -> None:
    """Some rows at a time, which stay in a core's cache and need no second copy."""
    rows, width = matrix.shape
    num_padded = -(-rows // _ROWS) * _ROWS
    num_scales = 4 * num_padded if bits == 8 else 0
    sections = part.split([len(part) - num_scales, num_scales])
    num_rows = max(1, _PIECE // (_ROWS * width)) * _ROWS
    for first in range(0, rows, num_rows):
        some = _rows(matrix, slice(first, first + num_rows))
        own = [_blocks_of_four(grouped(some))] if bits == 4 else _blocks_of_eight(some)
        for section, values in zip(sections, own, strict=False):  # 4 bits have no scales behind
            section[first * len(section) // num_padded :][: len(values)].copy_(values)


def _rows(matrix: Quantised, some: slice) -> Quantised:
    zero = None if matrix.zero is None else matrix.zero[some]
    return matrix._replace(qdata=matrix.qdata[some], scale=matrix.scale[some], zero=zero)


def _blocks_of_eight(matrix: Quantised) -> tuple[Tensor, Tensor]:
    """Bytes (int8) of the blocks of a matrix, and of its rows' scales."""
    rows, width = matrix.qdata.shape
    numbers = F.pad(matrix.qdata, (0, -width % _QUAD, 0, -rows % _ROWS))
    scales = F.pad(matrix.scale.float().flatten(), (0, -rows % _ROWS))
    blocks = numbers.view(-1, _ROWS, numbers.shape[1] // _QUAD, _QUAD).transpose(1, 2)
    return blocks.flatten() ^ -_ZERO, scales.view(torch.int8)  # 128 too large as unsigned bytes


def _blocks_of_four(matrix: Grouped) -> Tensor:
    """Bytes (int8) of the blocks of a matrix."""
    rows = matrix.numbers.shape[0]
    numbers, scale, offset = (F.pad(part, (0, 0, 0, -rows % _ROWS)) for part in matrix)
    halves = numbers.view(-1, _ROWS, scale.shape[1], 2, 4, _QUAD)  # block, row, group, half, i, j
    both = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)
    parts = [both.permute(0, 2, 3, 1, 4).flatten(2)]  # block, group, i row j
    for values in (scale, offset):
        per_group = values.view(-1, _ROWS, scale.shape[1]).transpose(1, 2).contiguous()
        parts.append(per_group.view(torch.uint8))
    return torch.cat(parts, dim=2).flatten().view(torch.int8)


def _huge_pages(num_bytes: int) -> Tensor:
    """A buffer that begins at a huge page, where there are any: fewer addresses to look up."""
    buffer = torch.empty(num_bytes + _HUGE_PAGE, dtype=torch.int8)
    buffer = buffer[-buffer.data_ptr() % _HUGE_PAGE :][:num_bytes]
    if sys.platform == "linux":
        start, length = buffer.data_ptr(), num_bytes // _HUGE_PAGE * _HUGE_PAGE
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)  # a wish
    return buffer
