"""Triton kernels in Triton's interpreter, against the PyTorch functions that they replace.

They run where triton is installed (`pip install triton`: 300 MB, and no test needs it).
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import masked_like, random_ids, tiny_model
from tiny_quantised import four_bits
from twotower import TwoTower
from twotower.graphs import backend
from twotower.graphs.backend import GraphsBackend, with_kernels
from twotower.kernels import expert_products, mixing, ops, quantised
from twotower.kernels.mixing import TORCH, MambaWeights, Modulation
from twotower.kernels.quantised import Quantised, dequantise, to_eight_bits
from twotower.layers.quantised import QuantisedMatrix
from twotower.model.precision import rounded_to_eight_bits

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels are defined
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    from twotower.kernels import fused

    yield fused


@pytest.fixture
def fused_products(fused: Any) -> Any:
    from twotower.kernels import fused_products

    return fused_products


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("states_every", ["none", "all"])
@pytest.mark.parametrize(
    ("length", "sizes", "width", "has_bias", "has_seed", "counts"),
    [
        (5, (4, 8, 2, 8), 4, True, True, None),
        (3, (6, 5, 2, 6), 4, False, True, [3, 1]),  # no powers of two
        (1, (4, 4, 1, 4), 2, True, True, [1, 0]),
        (4, (2, 4, 2, 4), 3, True, False, None),
    ],
)
def test_conv_scan(
    fused: Any,
    length: int,
    sizes: tuple[int, int, int, int],
    width: int,
    has_bias: bool,
    has_seed: bool,
    counts: list[int] | None,
    states_every: str,
) -> None:
    """Guards every short pass: a wrong tap, group, seed or step size gives fluent wrong text."""
    num_heads, head_dim, num_groups, state_size = sizes
    channels = num_heads * head_dim + 2 * num_groups * state_size
    weights = MambaWeights(
        drawn(channels, 1, width, seed=1), drawn(channels, seed=2) if has_bias else None,
        drawn(num_heads, seed=3) - 2, drawn(num_heads, seed=4), drawn(num_heads, seed=5),
    )  # fmt: skip
    window = drawn(2, width - 1 + length, channels, seed=6)
    dt = 9 * drawn(2, length, num_heads + 3, seed=7)[..., 3:]  # a part of a wider projection
    seed = drawn(2, num_heads, head_dim, state_size, seed=8) if has_seed else None
    valid = None
    if counts is not None:
        valid = torch.arange(length) < torch.tensor(counts).unsqueeze(1)
    every = length if states_every == "all" else None
    given = window, dt, weights, sizes, seed, valid, every
    found, expected = fused.conv_scan(*given), mixing.conv_scan(*given)
    for name in ("y", "heads", "dt", "B", "ssm")[: 5 if every else 4]:
        one, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(one, other, **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


def test_conv_scan_leaves_long_ones_to_products(fused: Any) -> None:
    weights = MambaWeights(drawn(12, 1, 2), None, drawn(2), drawn(2), drawn(2))
    given: Any = drawn(1, 66, 12), drawn(1, 65, 2), weights, (2, 2, 2, 2), None, None
    for every in (65, 13):
        found, expected = (m.conv_scan(*given, every) for m in (fused, mixing))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def eight_bits(*shape: int) -> Quantised:
    """Random matrices (N, K), or E of them."""
    found = [to_eight_bits(one) for one in drawn(*shape, seed=1).view(-1, *shape[-2:])]
    qdata, scale = (torch.stack([one[part] for one in found]) for part in (0, 1))
    return Quantised(qdata.view(shape), scale.view(*shape[:-1], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(37, 70), (5, 3), (48, 600)])
def test_products_with_eight_bits(
    fused_products: Any,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards remainders of tiles, the scale of a row, and what tokens beside a token do to it: then
    a draft would be verified by other numbers than a step's."""
    monkeypatch.setattr(fused_products, "_MANY_ROWS", 40)
    matrix, x = eight_bits(rows, columns), drawn(2, 9, columns + 3).to(dtype)[..., 3:]
    bias = drawn(rows, seed=2).to(dtype)
    full = dequantise(matrix, torch.float64)
    found, expected = fused_products.linear(x, matrix, bias), x.double() @ full.T + bias.double()
    sizes = x.double().abs() @ full.abs().T + bias.double().abs()  # of what is added up
    assert found.dtype == dtype
    assert ((found - expected).abs() <= (1e-6 if dtype == torch.float32 else 1e-3) * sizes).all()
    assert torch.equal(fused_products.linear(x[:1, 4:5], matrix, bias)[0, 0], found[0, 4])


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("counts", [(0, 17, 1, 0, 33), (0, 0, 2, 0, 0), (5, 3, 0, 1, 0)])
def test_experts_with_eight_bits(
    fused_products: Any, counts: tuple[int, ...], is_gated: bool
) -> None:
    """Guards whose tokens a program multiplies: experts without tokens, and with several tiles; and
    gates, without which texts would still flow."""
    up, down, gate = (
        QuantisedMatrix(size, 8, None, False) for size in ((5, 20, 10), (5, 10, 20), (5, 20, 10))
    )
    for seed, stack in enumerate((up, down, gate)):
        stack.qdata, stack.scale = eight_bits(*stack.shape)[:2]
        stack.scale = stack.scale * (1 + seed)
    experts = torch.arange(5).repeat_interleave(torch.tensor(counts))
    given = drawn(len(experts), 10), up, down, experts, gate if is_gated else None
    found, expected = fused_products.grouped_mlp(*given), expert_products.grouped_mlp(*given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_no_program_writes_what_is_anothers(
    fused_products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a race that no interpreter shows, where programs run one after another: the
    next expert's tokens, which here are nobody's."""
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *given, **of: empty(*given, **of).fill_(7))
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    found = fused_products.product(drawn(9, 10), eight_bits(3, 20, 10), ends)
    assert (found == 7).all(1).tolist() == 5 * [False] + 4 * [True]


def test_other_products_are_pytorchs(fused_products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what the kernel is not for: many tokens, tokens that are rounded, 4 bits."""
    matrix = eight_bits(6, 32)
    rounds, four = matrix._replace(rounds_input=True), four_bits(6, 32, 32)
    full = dequantise(matrix, torch.float32)
    monkeypatch.delattr(fused_products, "product")
    for tokens, weight in ((65, matrix), (3, rounds), (3, four), (3, full)):
        x = drawn(tokens, 32)
        assert torch.equal(fused_products.linear(x, weight), quantised.linear(x, weight))


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms(fused: Any, is_before: bool, dtype: torch.dtype) -> None:
    """Guards the order of norm and modulation, which differs by kind of layer, and what is rounded
    when: in float16 the two are equal but where sums in another order round to a neighbour."""
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-3}
    x, weight = drawn(3, 1, 4, 10).to(dtype), drawn(10, seed=1).to(dtype)
    shift, scale = drawn(3, 1, 2, 10, seed=2).to(dtype).unbind(2)
    modulation: Modulation = shift.unsqueeze(2), scale.unsqueeze(2)
    gated = drawn(3, 1, 4, 10, seed=4).to(dtype), drawn(3, 1, 1, 10, seed=5).to(dtype)
    streams = (x, x.float())  # wider than the weights, too
    for h, added, by in product(streams, (None, (gated[0], None), gated), (None, modulation)):
        given = h, added, weight, 1e-5, by, is_before
        found, expected = fused.add_norm(*given), mixing.add_norm(*given)
        assert torch.equal(found[0], expected[0])  # nothing is summed up
        torch.testing.assert_close(found[1], expected[1], **close)
    y, gate = drawn(2, 3, 10).to(dtype), drawn(2, 3, 15, seed=3).to(dtype)[..., 5:]
    found, expected = (m.gated_rms_norm(y, gate, weight, 2, 1e-5) for m in (fused, ops))
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_with_them(fused: Any, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the layers' use of them, with experts, all kinds of passes and rows of two lengths."""
    model = tiny_model()
    monkeypatch.setattr(backend, "fused_refusal", lambda device: None)
    ours = model.with_backend(GraphsBackend(model, quantization))
    if quantization == "int8":
        model = rounded_to_eight_bits(model)

    def tensors(model: TwoTower) -> list[Tensor]:
        cache = model.prefill(random_ids(2, 5), torch.tensor([5, 3]))
        output = model.verify(cache, random_ids(2, 4, seed=2))
        cache.commit(output, torch.tensor([1, 3]))
        logits = model.denoise(masked_like(random_ids(2, 4)), cache.view(), torch.tensor([0.5, 1]))
        return [output.hidden, logits, *(part for s in cache.layers for part in s or ())]

    by_pytorch = tensors(model)
    if quantization == "int8":
        monkeypatch.delattr(quantised, "linear")
        monkeypatch.delattr(expert_products, "grouped_mlp")
    for found, expected in zip(tensors(ours), by_pytorch, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-4)  # through 6 layers


def test_kernels_of_all_modules_are_replaced_and_weights_shared() -> None:
    model, calls = rounded_to_eight_bits(tiny_model()), list[str]()

    def watched(name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            calls.append(name)
            return getattr(TORCH, name)(*given)

        return call

    names = ("add_norm", "gated_rms_norm", "conv_scan", "linear", "grouped_mlp")
    own = with_kernels(model, mixing.Kernels(*map(watched, names)))
    assert torch.equal(
        own.prefill(random_ids(1, 3)).last_hidden,
        model.prefill(random_ids(1, 3)).last_hidden,
    )
    # Six layers and the norm behind them; two are Mamba's. Products: 4 of attention, 2 of others.
    assert {n: calls.count(n) for n in names} == dict(zip(names, (7, 2, 2, 16, 1), strict=True))
    assert [p.data_ptr() for p in own.parameters()] == [p.data_ptr() for p in model.parameters()]


def test_why_there_are_none() -> None:
    assert backend.fused_refusal(torch.device("cpu")) == "fused kernels run on CUDA devices"


class NoGpu:
    """What triton asks of a driver, for a GPU that nobody has: kernels are compiled and not run."""

    launcher_cls = staticmethod(lambda source, metadata: lambda *given, **more: None)

    def __init__(self) -> None:
        self.utils, self.binaries = self, list[bytes]()

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def load_binary(self, name: str, kernel: bytes, *given: object) -> tuple[object, ...]:
        self.binaries.append(kernel)
        return None, 0, 0, 0, 1024  # registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 * 1024}  # of an ordinary GPU


COMPILE = """
import sys, torch
sys.path[:0] = {path!r}
from triton.runtime import driver
from test_fused import NoGpu, eight_bits
gpu = NoGpu()
driver.set_active(gpu)
from twotower.kernels import fused, fused_products
from twotower.kernels.mixing import MambaWeights
for dtype in (torch.bfloat16, torch.float32):
    def zeros(*shape):
        return torch.zeros(shape, dtype=dtype)
    x, by = zeros(2, 1, 4, 64), zeros(2, 1, 1, 64)
    fused.add_norm(x.float(), (x, by), zeros(64), 1e-5, (by, by), True)
    fused.add_norm(x, None, zeros(64), 1e-5, (by, by), False)
    fused.gated_rms_norm(x, x, zeros(64), 2, 1e-5)
    heads = zeros(4)
    weights = MambaWeights(zeros(4 * 16 + 2 * 2 * 32, 1, 4), None, heads, heads, heads)
    fused.conv_scan(zeros(2, 7, 192), zeros(2, 4, 4), weights, (4, 16, 2, 32), None, None, 4)
    for rows in (48, 8192):
        fused_products.product(zeros(5, 64), eight_bits(rows, 64))
    fused_products.product(zeros(5, 64), eight_bits(3, 48, 64), torch.tensor([1, 2, 5]).int())
print(len(gpu.binaries), all(one[:4] == b"\\x7fELF" for one in gpu.binaries))
"""


def test_they_become_machine_code() -> None:
    """Guards a device's first minutes: what the interpreter takes the compiler may refuse, or it
    may want more shared memory than there is. No GPU is needed for that."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    path = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(path=path)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "14 True\n", done.stderr
