"""Matrices of 8 and 4 bits by hand, products with them, and agreement with torchao's tensors."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.checkpoint.quantize import quantise
from twotower.kernels import quantised
from twotower.kernels.quantised import Quantised, dequantise, linear, pack_halves
from twotower.layers.moe import sum_experts


def random_matrix(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def packed(bits: int, matrix: Tensor | None = None) -> Quantised:
    found = random_matrix() if matrix is None else matrix
    return quantise(found, bits, 32)  # type: ignore[arg-type]  # 4 or 8


def test_two_numbers_share_a_byte_by_halves_of_the_row() -> None:
    assert pack_halves(torch.tensor([[1, 2, 15, 4], [0, 9, 8, 0]])).tolist() == [
        [1 + 16 * 15, 2 + 16 * 4],
        [0 + 16 * 8, 9 + 0],
    ]


def test_values_by_hand() -> None:
    eight = Quantised(torch.tensor([[-2, 5]], dtype=torch.int8), torch.tensor([[0.5]]))
    assert dequantise(eight, torch.float32).tolist() == [[-1.0, 2.5]]
    numbers = torch.tensor([[0, 8, 15, 7]])  # minus 8: -8 0 | 7 -1
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[0.25, -1.0]])
    four = Quantised(pack_halves(numbers), scale.bfloat16(), zero.bfloat16())
    assert dequantise(four, torch.float32).tolist() == [[-3.75, 0.25, 13.0, -3.0]]


def test_eight_bits_are_half_a_step_off_at_most() -> None:
    matrix = random_matrix()
    matrix[3] *= 40.0  # a row's size is no concern of the others
    found = packed(8, matrix)
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert found.qdata.dtype == torch.int8 and found.scale.shape == (24, 1)
    assert ((dequantise(found, torch.float32) - matrix).abs() <= 0.51 * step).all()


def test_four_bits_are_half_a_step_off_at_most_and_keep_zero() -> None:
    """Guards the order of the groups: exchanged ones would be off by far more than a step."""
    matrix = random_matrix()
    matrix[:, :32] *= 40.0
    matrix[:, 5] = 0.0
    found = packed(4, matrix)
    groups = matrix.unflatten(1, (2, 32))
    span = groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)
    step = (span / 15).repeat_interleave(32, dim=1)
    # Half a step, and what rounding scale and zero to bfloat16 adds (8 steps * 2^-8, twice).
    assert ((dequantise(found, torch.float32) - matrix).abs() <= 0.6 * step).all()
    assert found.qdata.shape == (24, 32) and found.scale.dtype == torch.bfloat16
    assert (dequantise(found, torch.float32)[:, 5].abs() <= 0.07 * step[:, 5]).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_a_product_is_that_of_the_values(
    monkeypatch: pytest.MonkeyPatch, bits: int, dtype: torch.dtype, tokens: int
) -> None:
    """Guards the pieces of a large matrix: here one has 7 rows, the last one 3."""
    monkeypatch.setattr(quantised, "_PIECE", 7 * 64)
    found = packed(bits)
    x = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.arange(24.0).to(dtype)
    y = linear(x, found, bias)
    full = dequantise(found, dtype).double()
    expected = F.linear(x.double(), full, bias.double())
    sizes = F.linear(x.double().abs(), full.abs(), bias.double().abs())  # of what is added up
    assert y.dtype == dtype and y.shape == (2, tokens, 24)
    limit = 1e-6 if dtype == torch.float32 else 2.0**-7  # rounding: of sum, scale and bias
    assert ((y - expected).abs() <= limit * sizes).all()


def test_sums_of_whole_numbers_fit_into_float16() -> None:
    """Guards int8 weights in float16: 1024 times 127 is above its largest number, 65504."""
    matrix = Quantised(torch.full((1, 1024), 127, dtype=torch.int8), torch.tensor([[2.0**-10]]))
    y = linear(torch.ones(3, 1024, dtype=torch.float16), matrix)
    assert y.dtype == torch.float16 and y.tolist() == [[127.0]] * 3


def test_rounded_input_by_hand() -> None:
    matrix = Quantised(
        torch.tensor([[127, -1], [0, 3]], dtype=torch.int8),
        torch.tensor([[0.5], [2.0]]),
        rounds_input=True,
    )
    x = torch.tensor([[1.27, -0.634], [0.0, 0.0]])  # 0.01 a step: 127, -63.4 -> -63
    y = linear(x, matrix)
    assert y.tolist()[1] == [0.0, 0.0]
    assert y[0].tolist() == pytest.approx([0.01 * 0.5 * (127 * 127 + 63), 0.01 * 2.0 * 3 * -63])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_tokens_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    """Guards a scale shared by tokens: a row's text would change with the batch it is in."""
    found = packed(8)._replace(rounds_input=True)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[7] *= 100.0
    together = linear(x, found)
    for token in range(20):
        assert torch.equal(linear(x[token : token + 1], found)[0], together[token])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """Guards against 8 bits that turn NaN into an ordinary number."""
    x = torch.ones(1, 64)
    x[0, 3] = value
    for found in (packed(4), packed(8), packed(8)._replace(rounds_input=True)):
        assert not torch.isfinite(linear(x, found)).any()


def test_eight_bits_agree_with_torchaos_tensor() -> None:
    from torchao.quantization import Int8Tensor, PerRow

    x, matrix = random_matrix(5, 64, seed=3), random_matrix()
    theirs = F.linear(x, Int8Tensor.from_hp(matrix, PerRow()))
    assert torch.allclose(linear(x, packed(8)), theirs, atol=1e-6)


def test_four_bits_agree_with_torchaos_arithmetic() -> None:
    from torchao.quantization import MappingType, dequantize_affine, quantize_affine
    from torchao.quantization import choose_qparams_affine as choose

    matrix, block = random_matrix(), (1, 32)
    scale, offset = choose(
        matrix, MappingType.ASYMMETRIC, block, torch.uint8, 0, 15, scale_dtype=torch.bfloat16
    )
    numbers = quantize_affine(matrix, block, scale.float(), offset, torch.uint8, 0, 15)
    theirs = dequantize_affine(numbers, block, scale.float(), offset, torch.uint8, 0, 15)
    # Zero is stored in bfloat16: 8 steps * 2^-9.
    assert (dequantise(packed(4), torch.float32) - theirs).abs().max() < 0.02 * scale.max()


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_are_those_of_the_values(bits: int) -> None:
    """Guards experts that take a neighbour's scale."""
    num_experts, width, inner = 4, 64, 32
    up = [random_matrix(inner, width, seed=e) * (e + 1) for e in range(num_experts)]
    down = [random_matrix(width, inner, seed=9 + e) * (e + 1) for e in range(num_experts)]
    x = random_matrix(6, width, seed=20)
    chosen = torch.tensor([[0, 1], [2, 3], [3, 1], [0, 2], [1, 0], [3, 2]])
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(5))
    quantised = [[packed(bits, matrix) for matrix in side] for side in (up, down)]
    full = [torch.stack([dequantise(one, torch.float32) for one in side]) for side in quantised]
    found = sum_experts(x, chosen, weights, *quantised)
    expected = torch.zeros_like(x)
    for token in range(6):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            hidden = F.relu(full[0][expert] @ x[token]).square()
            expected[token] += weight * (full[1][expert] @ hidden)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("processor", ["this one", "AVX2"])
def test_sums_of_bytes_are_exact(processor: str) -> None:
    """Guards processors without VNNI, where PyTorch's own product cuts sums of two products to 16
    bits: texts would still flow. oneDNN is told to be on one, in a process of its own."""
    script = """
import torch
from twotower.kernels import quantised
generator = torch.Generator().manual_seed(0)
for tokens, width, rows in ((1, 40, 7), (17, 1024, 24), (33, 2500, 64)):
    x, w = (torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)
            for size in ((tokens, width), (rows, width)))
    assert torch.equal(quantised._sums_of_bytes(x, w), (x.double() @ w.double().T).int())
print("exact")
"""
    more = {} if processor == "this one" else {"ONEDNN_MAX_CPU_ISA": processor}
    source = str(Path(quantised.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": source} | more,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "exact\n", done.stderr
