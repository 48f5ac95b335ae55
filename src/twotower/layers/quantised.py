"""Drop-in linear layers and experts whose matrices are quantised, or lie in mapped files.

Same forward, same place in the tower. No gradients: such a model decodes, it does not train.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.kernels.mixing import TORCH
from twotower.kernels.quantised import Bits, Matrices, Quantised
from twotower.layers.moe import sum_experts


class QuantisedMatrix(nn.Module):
    """Buffers of one matrix (N, K), or of E stacked ones (E, N, K): see `Quantised`."""

    qdata: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self, shape: Sequence[int], bits: Bits, group_size: int | None, rounds_input: bool
    ) -> None:
        super().__init__()
        *leading, columns = shape
        self.shape, self.bits, self.group_size = tuple(shape), bits, group_size
        self.rounds_input = rounds_input
        groups = 1 if group_size is None else columns // group_size
        packed, kind = (columns, torch.int8) if bits == 8 else (columns // 2, torch.uint8)
        scales = torch.float32 if bits == 8 else torch.bfloat16
        self.register_buffer("qdata", torch.zeros(*leading, packed, dtype=kind))
        self.register_buffer("scale", torch.ones(*leading, groups, dtype=scales))
        zero = torch.zeros(*leading, groups, dtype=scales) if bits == 4 else None
        self.register_buffer("zero", zero)

    @property
    def matrix(self) -> Quantised:
        """The buffers as kernels take them."""
        return Quantised(self.qdata, self.scale, self.zero, self.rounds_input)

    def __len__(self) -> int:
        """Rows, or matrices of a stack."""
        return self.shape[0]

    def __getitem__(self, expert: int) -> Quantised:
        """One matrix of a stack."""
        zero = None if self.zero is None else self.zero[expert]
        return Quantised(self.qdata[expert], self.scale[expert], zero, self.rounds_input)


class QuantisedLinear(nn.Module):
    """Drop-in for `nn.Linear`; the bias keeps full precision."""

    kernels = TORCH

    def __init__(self, weight: QuantisedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight.matrix, self.bias)


class QuantisedExperts(nn.Module):
    """Drop-in for `Experts`, with its names."""

    kernels = TORCH

    def __init__(
        self,
        up_proj: QuantisedMatrix,
        down_proj: QuantisedMatrix,
        gate_proj: QuantisedMatrix | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As `Experts`."""
        mlp = self.kernels.grouped_mlp
        matrices = self.up_proj, self.down_proj, self.gate_proj
        return sum_experts(x, chosen, weights, *matrices, mlp)


class MappedExperts(nn.Module):
    """Drop-in for `Experts` whose matrices are views of files: only chosen ones are read, and the
    system may forget them again. They are no part of `state_dict`.
    """

    def __init__(self, up: Matrices, down: Matrices, gate: Matrices | None = None) -> None:
        super().__init__()
        self.up, self.down, self.gate = up, down, gate

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As `Experts`."""
        return sum_experts(x, chosen, weights, self.up, self.down, self.gate)
