"""The fast operations against the slow loops of slow_kernels.py in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import slow_kernels as reference
from twotower import masks
from twotower.kernels import expert_products, ops, ssd

Tensors = tuple[Tensor, ...]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scan_inputs(
    rows: int, length: int, heads: int, groups: int, has_initial: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x, dt, A, B, C, initial in float64; some steps are exactly 0, some large."""
    head_dim, state = 3, 5
    dt = torch.nn.functional.softplus(2 * draw(rows, length, heads, seed=seed) - 1)
    dt = dt.masked_fill(draw(rows, length, 1, seed=seed + 1) > 1.0, 0.0)
    return (
        draw(rows, length, heads, head_dim, seed=seed + 2),
        dt,
        -draw(heads, seed=seed + 3).exp(),
        draw(rows, length, groups, state, seed=seed + 4),
        draw(rows, length, groups, state, seed=seed + 5),
        draw(rows, heads, head_dim, state, seed=seed + 6) if has_initial else None,
    )


@st.composite
def scan_shapes(drawn: st.DrawFn) -> tuple[int, int]:
    """(L, states_every) with L in 1..200 and every kind of divisor."""
    length = drawn(st.integers(1, 200))
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    return length, drawn(st.sampled_from(divisors))


@given(
    shape=scan_shapes(),
    groups=st.sampled_from([1, 2, 4]),
    has_initial=st.booleans(),
    seed=st.integers(0, 99),
)
@example(shape=(1, 1), groups=2, has_initial=True, seed=0)
@example(shape=(2, 2), groups=1, has_initial=True, seed=0)
@example(shape=(ssd.TILE, ssd.TILE), groups=2, has_initial=True, seed=1)
@example(shape=(ssd.TILE + 1, ssd.TILE + 1), groups=2, has_initial=False, seed=2)
@example(shape=(3 * ssd.TILE, ssd.TILE), groups=4, has_initial=True, seed=3)
@example(shape=(134, 67), groups=2, has_initial=True, seed=4)
def test_scan(shape: tuple[int, int], groups: int, has_initial: bool, seed: int) -> None:
    """Guards every length and split: a scan that is wrong only below or just above its tile, or
    only with a seed, shows in no test of one length (the official stand-in was wrong below)."""
    length, states_every = shape
    inputs = scan_inputs(2, length, 4, groups, has_initial, seed)
    y, states = ssd.ssd_scan(*inputs, states_every)
    expected_y, expected_states = reference.ssd_scan(*inputs, states_every)
    assert y.dtype == states.dtype == torch.float32
    # float32 sums of up to 200 terms of size 10: 1e-4 is 10 times what was seen
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states.double(), expected_states, rtol=1e-4, atol=1e-4)


def gradients(scan: Callable[..., Tensors], inputs: Tensors, states_every: int) -> Tensors:
    """Gradients of a weighted sum of the outputs and of every returned state."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    y, states = scan(*leaves, states_every)
    weight_y, weight_states = draw(*y.shape, seed=90), draw(*states.shape, seed=91)
    loss = (y.double() * weight_y).sum() + (states.double() * weight_states).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("length", "states_every"), [(1, 1), (6, 2), (70, 70), (130, 65)])
def test_scan_gradients(length: int, states_every: int) -> None:
    """Guards training: gradients through the initial state and through returned boundary states
    reach x, dt, A, B and C; a detached state trains a context tower that never hears of blocks."""
    inputs = scan_inputs(2, length, 4, 2, True, seed=7)
    assert inputs[5] is not None
    ours = gradients(ssd.ssd_scan, inputs, states_every)
    expected = gradients(reference.ssd_scan, inputs, states_every)
    for name, a, b in zip(["x", "dt", "A", "B", "C", "initial"], ours, expected, strict=True):
        scale = float(b.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("length", [1, 2, 16, ssd.TILE, ssd.TILE + 1])
@pytest.mark.parametrize("has_initial", [True, False])
def test_outputs_without_states(length: int, has_initial: bool) -> None:
    """Guards denoiser passes and verifications, which make no states: a shorter way that forgot
    the seed or the decay from it would still give plausible drafts."""
    inputs = scan_inputs(2, length, 4, 2, has_initial, seed=5)

    def with_states(*leaves: Tensor | None) -> Tensor:
        return ssd.ssd_scan(*leaves, length)[0]

    leaves = [None if value is None else value.clone().requires_grad_() for value in inputs]
    given = [leaf for leaf in leaves if leaf is not None]
    found = []
    for outputs in (ssd.ssd_outputs, with_states):
        y = outputs(*leaves)
        weighted = (y.double() * draw(*y.shape, seed=90)).sum()
        found.append((y, *torch.autograd.grad(weighted, given)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def test_gradients_stay_finite_with_strong_decay() -> None:
    """Guards against inf * 0: above the diagonal the exponent is positive and overflows."""
    x, dt, A, B, C, initial = scan_inputs(1, 80, 4, 2, True, seed=3)
    found = gradients(ssd.ssd_scan, (x, dt + 5, 40 * A, B, C, initial), 80)
    assert all(bool(value.isfinite().all()) for value in found)


def test_a_step_of_zero_leaves_the_state() -> None:
    """Guards padding: a padded token must change neither the state nor what follows."""
    x, dt, A, B, C, initial = scan_inputs(2, 9, 4, 2, True, seed=5)
    dt[:, 4:] = 0.0
    _, states = ssd.ssd_scan(x, dt, A, B, C, initial, 1)
    assert torch.equal(states[:, 8], states[:, 3])
    x[:, 4:] = 1e30  # what padding holds does not matter
    _, with_other_padding = ssd.ssd_scan(x, dt, A, B, C, initial, 1)
    assert torch.equal(with_other_padding[:, 8], states[:, 8])


@pytest.mark.parametrize("states_every", [0, 3, 8])
def test_scan_refuses_a_split_that_does_not_fit(states_every: int) -> None:
    inputs = scan_inputs(1, 7, 4, 2, False, seed=0)
    with pytest.raises(ValueError, match=f"states_every={states_every} must divide the 7 tokens"):
        ssd.ssd_scan(*inputs, states_every)


def test_scan_stays_in_float32_under_autocast() -> None:
    """Guards the state's precision: autocast would round the products to bfloat16."""
    inputs = tuple(
        value if value is None else value.float() for value in scan_inputs(1, 70, 4, 2, True, 1)
    )
    plain = ssd.ssd_scan(*inputs, 70)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ssd.ssd_scan(*inputs, 70)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@given(
    length=st.integers(1, 12),
    width=st.integers(1, 5),
    has_bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_convolution(length: int, width: int, has_bias: bool, seed: int) -> None:
    """Guards the order of the taps (the last is the current token) and blocks shorter than W."""
    x = draw(2, width - 1 + length, 6, seed=seed)
    weight, bias = draw(6, 1, width, seed=seed + 1), draw(6, seed=seed + 2) if has_bias else None
    expected = reference.causal_conv1d(x, weight, bias)
    bias32 = None if bias is None else bias.float()
    ours = ops.causal_conv1d(x.float(), weight.float(), bias32)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


ATTENTION_MASKS: dict[str, Callable[[int, int], Tensor | None]] = {
    "none": lambda length, past: None,
    "causal": lambda length, past: masks.causal(length, past),
    "causal rows": lambda length, past: masks.causal_rows(length, torch.tensor([past, 1]), past),
    "full rows": lambda length, past: masks.full_rows(length, torch.tensor([1, past]), past),
}


@pytest.mark.parametrize("kind", ATTENTION_MASKS)
@pytest.mark.parametrize(("length", "past"), [(1, 5), (4, 3), (5, 1)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(kind: str, length: int, past: int, kv_heads: int) -> None:
    """Guards grouped heads (consecutive query heads share a KV head), scale and masks."""
    q = draw(2, length, 4, 6, seed=1)
    k, v = draw(2, past + length, kv_heads, 6, seed=2), draw(2, past + length, kv_heads, 6, seed=3)
    mask = ATTENTION_MASKS[kind](length, past)
    expected = reference.attention(q, k, v, mask)
    for product in (ops.attention, ops.attention_by_groups):
        if mask is None and product is ops.attention_by_groups:
            continue  # unmasked kernels have grouped queries
        ours = product(q.float(), k.float(), v.float(), mask)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@given(counts=st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any))
def test_grouped_mlp(counts: list[int]) -> None:
    """Guards the pairing of tokens with experts, also when some experts have none."""
    up, down = draw(3, 12, 8, seed=1).float(), draw(3, 8, 12, seed=2).float()
    gate, x = draw(3, 12, 8, seed=4).float(), draw(sum(counts), 8, seed=3).float()
    owner = [expert for expert, count in enumerate(counts) for _ in range(count)]
    pairs = list(zip(owner, x, strict=True))
    relu2 = [down[e] @ (up[e] @ row).clamp(min=0).pow(2) for e, row in pairs]
    gated = [down[e] @ (F.silu(gate[e] @ row) * (up[e] @ row)) for e, row in pairs]
    for product in (expert_products.grouped_mlp, expert_products.grouped_products):
        for gates, expected in ((None, relu2), (gate, gated)):
            ours = product(x, up, down, torch.tensor(owner), gates)
            torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_norms_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])
    weight = torch.tensor([1.0, 2.0])
    root = math.sqrt(12.5 + 0.5)
    normed = ops.rms_norm(x, weight, eps=0.5)
    torch.testing.assert_close(normed, torch.tensor([[3 / root, 8 / root]]))
    # two groups of two channels, the gate before the norm
    y = torch.tensor([[[3.0, 4.0, 30.0, 40.0]]])
    gate = torch.full((1, 1, 4), 1.0)
    silu = 1 / (1 + math.exp(-1))
    first, second = (math.sqrt(12.5 * (f * silu) ** 2 + 0.5) for f in (1, 10))
    expected = torch.tensor([3 / first, 4 / first, 30 / second, 40 / second]) * silu
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ours = ops.gated_rms_norm(y, gate, weight, num_groups=2, eps=0.5)
    torch.testing.assert_close(ours, (expected * weight).view(1, 1, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_compute_in_float32_and_keep_the_dtype(dtype: torch.dtype) -> None:
    """Guards against a mean of squares in bfloat16, which is wrong in the third digit."""
    x = draw(4, 64, seed=1).to(dtype)
    weight = (1 + draw(64, seed=2) / 5).to(dtype)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    ours = ops.rms_norm(x, weight, 1e-5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, (expected * weight.double()).to(dtype), rtol=1e-2, atol=1e-6)
    once = (x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()) * weight.float()
    assert torch.equal(ours, once.to(dtype)), "rounded once, at the end"
