"""The functions of `mixing` as Triton kernels: one launch each, without gradient.

A short pass on a GPU is thousands of small operations, and these are most of them. Needs triton:
import it where `graphs.backend.fused_refusal` gives no reason against it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels import fused_products, mixing
from twotower.kernels.mixing import Added, Kernels, MambaWeights, Modulation, Scanned

_MAX_TOKENS = 64  # of a row: the scan goes from token to token, where longer ones have products
_MAX_STATE = 1 << 14  # numbers of a head's state, which stay in registers


@triton.jit
def _modulated(v, shift, scale, places, mask, dtype: tl.constexpr):
    """Rounded where PyTorch's three operations round."""
    by = (1 + tl.load(scale + places, mask, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
    added = tl.load(shift + places, mask, 0.0).to(tl.float32)
    return ((v.to(tl.float32) * by).to(dtype).to(tl.float32) + added).to(dtype)


@triton.jit
def _norm(
    x, gate, weight, shift, scale, added, by, total, out, group_size, x_stride, gate_stride,
    out_stride, added_stride, tokens_per_row, shift_stride, scale_stride, by_stride, eps,
    ORDER: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A group of one token's channels. ORDER: 0 no modulation, 1 before the norm, 2 behind it.
    ADDED: 0 nothing, 1 what is added to x before, 2 that times a gate."""
    token, group = tl.program_id(0), tl.program_id(1)
    mask = tl.arange(0, BLOCK) < group_size
    cols = group * group_size + tl.arange(0, BLOCK)
    dtype: tl.constexpr = out.dtype.element_ty
    row = token // tokens_per_row
    shift, scale = shift + row * shift_stride, scale + row * scale_stride
    v = tl.load(x + token * x_stride + cols, mask, 0.0)
    if ADDED > 0:
        y = tl.load(added + token * added_stride + cols, mask, 0.0)
        if ADDED == 2:
            gates = tl.load(by + row * by_stride + cols, mask, 0.0).to(tl.float32)
            y = (gates * y.to(tl.float32)).to(y.dtype)
        v = (v.to(tl.float32) + y.to(v.dtype).to(tl.float32)).to(v.dtype)
        tl.store(total + token * out_stride + cols, v, mask)
    v = v.to(dtype)
    if ORDER == 1:
        v = _modulated(v, shift, scale, cols, mask, dtype)
    wide = v.to(tl.float32)
    if GATED:
        z = tl.load(gate + token * gate_stride + cols, mask, 0.0).to(tl.float32)
        wide = wide * (z / (1 + tl.exp(-z)))
    root = tl.rsqrt(tl.sum(wide * wide, 0) / group_size + eps)
    u = (wide * root * tl.load(weight + cols, mask, 0.0).to(tl.float32)).to(dtype)
    if ORDER == 2:
        u = _modulated(u, shift, scale, cols, mask, dtype)
    tl.store(out + token * out_stride + cols, u, mask)


@triton.jit
def _conv(
    window, weight, bias, start, channel, mask, num_channels, dtype: tl.constexpr,
    W: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The causal convolution of some channels at one token, with silu, rounded to the dtype."""
    y = tl.zeros_like(channel).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + channel, mask, 0.0).to(tl.float32)
    for tap in tl.static_range(W):
        v = tl.load(window + start + tap * num_channels + channel, mask, 0.0).to(tl.float32)
        y += v * tl.load(weight + channel * W + tap, mask, 0.0).to(tl.float32)
    return (y / (1 + tl.exp(-y))).to(dtype).to(tl.float32)


@triton.jit
def _scan(
    window, dt, conv, conv_bias, dt_bias, A_log, D, seed, valid, y, heads, steps, Bs, ssm,
    length, dt_row, dt_token, H, P, G, N, num_channels,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One head of one row: its state stays in registers from the first token to the last."""
    row, head = tl.program_id(0), tl.program_id(1)
    group = head // (H // G)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    has_p, has_n = p < P, n < N
    dtype: tl.constexpr = y.dtype.element_ty
    places = ((row * H + head) * P + p)[:, None] * N + n[None, :]
    has_place = has_p[:, None] & has_n[None, :]
    state = tl.load(seed + places, has_place, 0.0)
    A = -tl.exp(tl.load(A_log + head).to(tl.float32))
    skip, bias = tl.load(D + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
    of_x, of_B = head * P + p, H * P + group * N + n
    of_C = of_B + G * N
    for token in range(length):
        start, at = (row * (length + W - 1) + token) * num_channels, row * length + token
        x = _conv(window, conv, conv_bias, start, of_x, has_p, num_channels, dtype, W, HAS_BIAS)
        B = _conv(window, conv, conv_bias, start, of_B, has_n, num_channels, dtype, W, HAS_BIAS)
        C = _conv(window, conv, conv_bias, start, of_C, has_n, num_channels, dtype, W, HAS_BIAS)
        raw = tl.load(dt + row * dt_row + token * dt_token + head).to(tl.float32) + bias
        e = tl.exp(tl.minimum(raw, 20.0))
        small = e * (1 - 0.5 * e)  # log(1 + e) where 1 + e would lose it
        step = tl.where(raw > 20.0, raw, tl.where(e < 1e-3, small, tl.log(1 + e)))
        if HAS_VALID:
            step = step * tl.load(valid + at).to(tl.float32)
        state = state * tl.exp(step * A) + (step * x)[:, None] * B[None, :]
        out = tl.sum(state * C[None, :], 1) + x * skip
        tl.store(y + (at * H + head) * P + p, out.to(dtype), has_p)
        tl.store(heads + (at * H + head) * P + p, x, has_p)
        tl.store(steps + at * H + head, step)
        if head % (H // G) == 0:
            tl.store(Bs + (at * G + group) * N + n, B.to(dtype), has_n)
    tl.store(ssm + places, state, has_place)


def add_norm(
    h: Tensor,
    added: Added | None,
    weight: Tensor,
    eps: float,
    modulation: Modulation | None,
    is_before: bool,
) -> tuple[Tensor, Tensor]:
    """`mixing.add_norm`; PyTorch's for a modulation of several blocks."""
    y, gate = (None, None) if added is None else added
    factors = [part for part in (*(modulation or (None, None)), gate) if part is not None]
    if factors and (h.dim() != 4 or any(part.shape[1] > 1 for part in factors)):
        return mixing.add_norm(h, added, weight, eps, modulation, is_before)
    x = h.reshape(-1, h.shape[-1])
    out, total = (x.new_empty(x.shape, dtype=of.dtype) for of in (weight, h))
    # What is not there is not read.
    shift, scale, by = (
        x if part is None else part.reshape(-1, x.shape[1])
        for part in (*(modulation or (None, None)), gate)
    )
    summed = (x if y is None else y.reshape(x.shape)), total
    tokens_per_row = len(x) // len(factors[0]) if factors else 1
    order = 0 if modulation is None else 1 if is_before else 2
    kind = {"ORDER": order, "ADDED": 0 if y is None else 1 if gate is None else 2}
    of_rows = shift, scale, by, tokens_per_row
    _run_norm(x, None, weight, out, 1, eps, of_rows, summed, **kind)
    return h if y is None else total.view(h.shape), out.view(h.shape)


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """`ops.gated_rms_norm`."""
    x, gates = y.reshape(-1, y.shape[-1]), gate.reshape(-1, y.shape[-1])
    out = gates.new_empty(gates.shape)
    _run_norm(x, gates, weight, out, num_groups, eps, (x, x, x, 1), (x, x), ORDER=0, ADDED=0)
    return out.view(gate.shape)


def _run_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    out: Tensor,
    num_groups: int,
    eps: float,
    of_rows: tuple[Tensor, Tensor, Tensor, int],
    summed: tuple[Tensor, Tensor],
    **kind: int,
) -> None:
    """x, gate, out (tokens, D); of rows: shift, scale and gate (rows, D), and how many tokens a row
    has; summed: what is added to x, and the sum.
    """
    (shift, scale, by, tokens_per_row), (added, total) = of_rows, summed
    z, group_size = x if gate is None else gate, x.shape[1] // num_groups
    _norm[len(x), num_groups](
        x, z, weight, shift, scale, added, by, total, out, group_size, x.stride(0), z.stride(0),
        out.stride(0), added.stride(0), tokens_per_row, shift.stride(0), scale.stride(0),
        by.stride(0), eps, GATED=gate is not None, BLOCK=triton.next_power_of_2(group_size), **kind,
    )  # fmt: skip


def conv_scan(
    window: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    sizes: tuple[int, int, int, int],
    seed: Tensor | None,
    is_valid: Tensor | None,
    states_every: int | None,
) -> Scanned:
    """`mixing.conv_scan`; PyTorch's for more than 64 tokens, large states and several of them."""
    (num_rows, length, num_heads), (_, head_dim, num_groups, state_size) = dt.shape, sizes
    tile = triton.next_power_of_2(head_dim), triton.next_power_of_2(state_size)
    is_large = length > _MAX_TOKENS or tile[0] * tile[1] > _MAX_STATE
    if is_large or states_every not in (None, length):
        return mixing.conv_scan(window, dt, weights, sizes, seed, is_valid, states_every)
    if seed is None:
        seed = window.new_zeros(num_rows, num_heads, head_dim, state_size, dtype=torch.float32)
    seed = seed.float().contiguous()
    heads = seed.new_empty(num_rows, length, num_heads, head_dim)
    y, steps = torch.empty_like(heads, dtype=window.dtype), heads.new_empty(dt.shape)
    B = window.new_empty(num_rows, length, num_groups, state_size)
    ssm, bias = torch.empty_like(seed), weights.conv_bias
    _scan[num_rows, num_heads](
        window, dt, weights.conv, weights.conv if bias is None else bias, weights.dt_bias,
        weights.A_log, weights.D, seed,
        steps if is_valid is None else is_valid.view(torch.uint8),
        y, heads, steps, B, ssm, length, dt.stride(0), dt.stride(1), *sizes, window.shape[2],
        W=weights.conv.shape[-1], HAS_BIAS=bias is not None, HAS_VALID=is_valid is not None,
        BP=tile[0], BN=tile[1], num_warps=8 if tile[0] * tile[1] > 4096 else 4,
    )  # fmt: skip
    return Scanned(y, heads, steps, B, ssm.unsqueeze(1))


FUSED = Kernels(
    add_norm, gated_rms_norm, conv_scan, fused_products.linear, fused_products.grouped_mlp
)
