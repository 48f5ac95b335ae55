"""The other operations of the layers in plain PyTorch: any device, differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) / sqrt(mean(x^2) + eps) * weight, in float32; the result has x's dtype."""
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.float()).to(x.dtype)


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """RMSNorm of y * silu(gate) per group of channels, in float32; the result has the gate's dtype.

    y, gate (B, L, H*P); the mean of squares is taken over H*P/G channels. The gate comes before the
    norm (system.md section 2, Mamba-2).
    """
    gated: Tensor = (y.float() * F.silu(gate.float())).unflatten(-1, (num_groups, -1))
    scale = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((gated * scale).flatten(-2) * weight.float()).to(gate.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query softmax attention: q (B, L, Hq, A), k, v (B, S, Hk, A) -> (B, L, Hq, A).

    mask: True = may attend, broadcastable to (B, Hq, L, S), or None. Scale 1/sqrt(A).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution and silu in float32; the result has x's dtype.

    x (B, W-1+L, C) with its past in front -> (B, L, C); weight (C, 1, W), the last tap is the
    current token; bias (C,) or None.
    """
    length = x.shape[1] - weight.shape[-1] + 1
    taps = weight.squeeze(1).t().float()  # (W, C)
    wide = x.float()  # adding the taps up in bfloat16 would round W times
    # Shifted products: the library's depthwise convolution wants (B, C, L) and is slower here.
    y = wide[:, :length] * taps[0]
    for tap in range(1, len(taps)):
        y = y + wide[:, tap : tap + length] * taps[tap]
    return F.silu(y if bias is None else y + bias.float()).to(x.dtype)


def grouped_mlp(x: Tensor, up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """relu2 MLPs of several experts on tokens sorted by expert.

    x (tokens, D); up (E, F, D); down (E, D, F); counts: tokens of each expert, in order.
    Returns (tokens, D).
    """
    pieces = torch.split(x, counts)
    return torch.cat(
        [
            F.linear(F.relu(F.linear(piece, up[expert])).square(), down[expert])
            for expert, piece in enumerate(pieces)
            if len(piece)
        ]
    )
