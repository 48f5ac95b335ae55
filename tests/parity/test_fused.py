"""Triton kernels in Triton's interpreter, against the PyTorch functions that they replace.

They run where triton is installed (`pip install triton`: 300 MB, and no test needs it).
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import masked_like, random_ids, tiny_model
from twotower import TwoTower
from twotower.graphs import backend
from twotower.graphs.backend import GraphsBackend, with_kernels
from twotower.kernels import mixing, ops
from twotower.kernels.mixing import TORCH, MambaWeights, Modulation, fused_refusal

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels are defined
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    from twotower.kernels import fused

    yield fused


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


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms(fused: Any, is_before: bool, dtype: torch.dtype) -> None:
    """Guards the order of norm and modulation, which differs by kind of layer, and what is rounded
    when: in float16 the two are equal but where sums in another order round to a neighbour."""
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-3}
    x, weight = drawn(3, 1, 4, 10).to(dtype), drawn(10, seed=1).to(dtype)
    shift, scale = drawn(3, 1, 2, 10, seed=2).to(dtype).unbind(2)
    modulation: Modulation = shift.unsqueeze(2), scale.unsqueeze(2)
    for added in (None, modulation):
        found, expected = (m.rms_norm(x, weight, 1e-5, added, is_before) for m in (fused, mixing))
        torch.testing.assert_close(found, expected, **close)
    y, gate = drawn(2, 3, 10).to(dtype), drawn(2, 3, 15, seed=3).to(dtype)[..., 5:]
    found, expected = (m.gated_rms_norm(y, gate, weight, 2, 1e-5) for m in (fused, ops))
    torch.testing.assert_close(found, expected, **close)


def test_a_model_with_them(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the layers' use of them, with experts, all kinds of passes and rows of two lengths."""
    model = tiny_model()
    monkeypatch.setattr(backend, "fused_refusal", lambda device: None)
    ours = model.with_backend(GraphsBackend(model))

    def tensors(model: TwoTower) -> list[Tensor]:
        cache = model.prefill(random_ids(2, 5), torch.tensor([5, 3]))
        output = model.verify(cache, random_ids(2, 4, seed=2))
        cache.commit(output, torch.tensor([1, 3]))
        logits = model.denoise(masked_like(random_ids(2, 4)), cache.view(), torch.tensor([0.5, 1]))
        return [output.hidden, logits, *(part for s in cache.layers for part in s or ())]

    for found, expected in zip(tensors(ours), tensors(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-4)  # through 6 layers


def test_kernels_of_all_modules_are_replaced_and_weights_shared() -> None:
    model, calls = tiny_model(), list[str]()

    def watched(name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            calls.append(name)
            return getattr(TORCH, name)(*given)

        return call

    names = ("rms_norm", "gated_rms_norm", "conv_scan")
    own = with_kernels(model, mixing.Kernels(*map(watched, names)))
    assert torch.equal(
        own.prefill(random_ids(1, 3)).last_hidden,
        model.prefill(random_ids(1, 3)).last_hidden,
    )
    # Six layers and the norm behind them; two of them are Mamba's.
    assert {n: calls.count(n) for n in names} == dict(zip(names, (7, 2, 2), strict=True))
    assert [p.data_ptr() for p in own.parameters()] == [p.data_ptr() for p in model.parameters()]


def test_why_there_are_none() -> None:
    assert fused_refusal(torch.device("cpu")) == "fused kernels run on CUDA devices"
