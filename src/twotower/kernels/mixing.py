"""What a layer does around its products, as functions that a backend may replace (`Kernels`).

These are PyTorch: any device, differentiable. `fused` has the same in one launch each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from twotower.kernels import expert_products, ops, quantised, ssd
from twotower.kernels.expert_products import GroupedMLP
from twotower.kernels.quantised import Quantised

Modulation = tuple[Tensor, Tensor]
Added = tuple[Tensor, Tensor | None]


class MambaWeights(NamedTuple):
    """Of one mixer, between its projections: conv (C, 1, W), conv_bias (C,) or None; the others
    (H,).
    """

    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


class Scanned(NamedTuple):
    """y (B, L, H, P) in the input's dtype, and what the scan got: heads (B, L, H, P) and dt
    (B, L, H) in float32, B (B, L, G, N); ssm (B, L/states_every, H, P, N) where states were wanted.
    """

    y: Tensor
    heads: Tensor
    dt: Tensor
    B: Tensor
    ssm: Tensor | None


def conv_scan(
    window: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    sizes: tuple[int, int, int, int],
    seed: Tensor | None,
    is_valid: Tensor | None,
    states_every: int | None,
) -> Scanned:
    """Convolution, step sizes and scan of a Mamba-2 mixer.

    window (B, W-1+L, C), the past in front; dt (B, L, H) as projected; sizes H, P, G, N; seed
    (B, H, P, N) or None for zeros; is_valid (B, L): tokens that change the state, None for all;
    states after every `states_every` tokens, None for none.
    """
    num_heads, head_dim, num_groups, state_size = sizes
    xbc = ops.causal_conv1d(window, weights.conv, weights.conv_bias)
    widths = [num_heads * head_dim, *2 * [num_groups * state_size]]
    heads, B, C = xbc.split(widths, dim=-1)
    heads = heads.unflatten(-1, (num_heads, head_dim)).float()
    B, C = (value.unflatten(-1, (num_groups, state_size)) for value in (B, C))
    dt = F.softplus(dt.float() + weights.dt_bias.float())
    if is_valid is not None:
        dt = dt * is_valid.unsqueeze(-1)
    A, ssm = -weights.A_log.float().exp(), None
    if states_every is None:
        y = ssd.ssd_outputs(heads, dt, A, B, C, seed)
    else:
        y, ssm = ssd.ssd_scan(heads, dt, A, B, C, seed, states_every)
    # Rounded here, before the norm, and after the convolution: where the released code rounds.
    y = (y + heads * weights.D.float().unsqueeze(-1)).to(window.dtype)
    return Scanned(y, heads, dt, B, ssm)


def add_norm(
    h: Tensor,
    added: Added | None,
    weight: Tensor,
    eps: float,
    modulation: Modulation | None,
    is_before: bool,
) -> tuple[Tensor, Tensor]:
    """The residual stream h (..., D), in its dtype, with a mixer's output y and its gate added; and
    its RMSNorm in the weight's dtype, with x (1 + scale) + shift before or behind the norm.

    added: (y, gate); modulation: (shift, scale). gate, shift and scale broadcast against h.
    """
    if added is not None:
        y, gate = added
        h = h + (y if gate is None else gate * y).to(h.dtype)
    x = h.to(weight.dtype)
    if modulation is None:
        return h, ops.rms_norm(x, weight, eps)
    shift, scale = modulation
    if is_before:
        return h, ops.rms_norm(x * (1 + scale) + shift, weight, eps)
    return h, ops.rms_norm(x, weight, eps) * (1 + scale) + shift


@dataclass(frozen=True)
class Kernels:
    """How a model's layers compute these; each has the signature of the function of its name."""

    add_norm: Callable[
        [Tensor, Added | None, Tensor, float, Modulation | None, bool], tuple[Tensor, Tensor]
    ]
    gated_rms_norm: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    conv_scan: Callable[..., Scanned]
    linear: Callable[[Tensor, Tensor | Quantised, Tensor | None], Tensor]
    """Of quantised layers alone."""
    grouped_mlp: GroupedMLP
    """The same."""


TORCH = Kernels(
    add_norm, ops.gated_rms_norm, conv_scan, quantised.linear, expert_products.grouped_mlp
)
