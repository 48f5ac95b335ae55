"""The other operations of the layers in plain PyTorch: any device, differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_QUERIES = 64  # the mask of grouped queries grows with their number


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
    if mask is not None and q.is_cuda and q.shape[1] <= _FEW_QUERIES and q.shape[2] > k.shape[2]:
        return attention_by_groups(q, k, v, mask)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def attention_by_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`attention` for a few queries, on devices whose masked kernels have no grouped queries: the
    heads that share keys become further queries, and no key is copied for them.
    """
    num_shared, length = q.shape[2] // k.shape[2], q.shape[1]
    # (B, Hk, Hq/Hk * L, A)
    q = q.unflatten(2, (-1, num_shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if mask.shape[-2] > 1:
        mask = mask.repeat(*[1] * (mask.dim() - 2), num_shared, 1)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    y: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = y.unflatten(2, (num_shared, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return y


def attention_after(
    q: Tensor, past: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """`attention` to keys and values of a past (B, S, Hk, A) and to this call's own (B, L, Hk, A).

    mask (..., S + L), past first, or (..., L): all of the past is seen. In float32 on a CPU without
    gradient nothing of the past is copied: both parts are attended to apart and merged by their
    weights. Narrower types would round twice, where the released code rounds once.
    """
    num_past, length = past[0].shape[1], own[0].shape[1]
    if num_past == 0:
        return attention(q, *own, mask)
    if torch.is_grad_enabled() or q.device.type != "cpu" or q.dtype != torch.float32:
        if mask is not None and mask.shape[-1] == length:
            mask = F.pad(mask, (num_past, 0), value=True)
        keys, values = (
            torch.cat([old.to(new.dtype), new], dim=1) for old, new in zip(past, own, strict=True)
        )
        return attention(q, keys, values, mask)
    of_past = None if mask is None or mask.shape[-1] == length else mask[..., :num_past]
    far, far_weight = _weighed_attention(q, past, of_past)
    near, near_weight = _weighed_attention(q, own, None if mask is None else mask[..., -length:])
    share = torch.sigmoid(near_weight - far_weight).unsqueeze(-1)
    return torch.lerp(far, near, share).transpose(1, 2)


def _weighed_attention(
    q: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention (B, Hq, L, A) and the log of the sum of its exponentials (B, Hq, L) float32.

    A query that sees no key gets 0 and -inf.
    """
    added = None
    if mask is not None:
        added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        added = added.expand(len(q), -1, -1, -1) if added.dim() == 4 else added
    k, v = (part.to(q.dtype).transpose(1, 2) for part in keys)
    y, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k, v, 0.0, False, attn_mask=added
    )
    if mask is not None:  # the kernel says 0 where a query sees nothing
        weight = weight.masked_fill(~mask.any(-1), float("-inf"))
    return y, weight


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution and silu in float32; the result has x's dtype.

    x (B, W-1+L, C) with its past in front -> (B, L, C); weight (C, 1, W), the last tap is the
    current token; bias (C,) or None.
    """
    length = x.shape[1] - weight.shape[-1] + 1
    taps = weight.squeeze(1).t().float()  # (W, C)
    wide = x.float()  # adding the taps up in bfloat16 would round W times
    # Shifted products: the library's depthwise convolution wants (B, C, L) and is slower here.
    y = wide.new_zeros(()) if bias is None else bias.float()
    for tap, weights in enumerate(taps.unbind()):
        y = torch.addcmul(y, wide[:, tap : tap + length], weights)
    return F.silu(y).to(x.dtype)
