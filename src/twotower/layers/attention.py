"""Grouped-query attention, with or without rotary positions."""

from typing import NamedTuple

from torch import Tensor, nn

from twotower import masks
from twotower.kernels import ops
from twotower.layers.norms import RMSNorm
from twotower.layers.rope import Rotation, rotate
from twotower.specs import AttentionSpec


class KV(NamedTuple):
    """Keys, turned to their positions, and values of S tokens, each (B, S, Hk, A)."""

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    """Attend to a past and to this call's own tokens."""

    def __init__(self, width: int, spec: AttentionSpec, eps: float) -> None:
        """eps: of the norms of queries and keys."""
        super().__init__()
        self.head_dim = spec.head_dim
        self.has_rope, self.window = spec.rope is not None, spec.window
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(width, queries, bias=spec.bias)
        self.k_proj = nn.Linear(width, keys, bias=spec.bias)
        self.v_proj = nn.Linear(width, keys, bias=spec.bias)
        self.o_proj = nn.Linear(queries, width, bias=spec.out_bias)
        self.q_norm = RMSNorm(spec.head_dim, eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, eps) if spec.qk_norm else None

    def forward(
        self, x: Tensor, past: KV | None, mask: Tensor | None, rotation: Rotation | None = None
    ) -> tuple[Tensor, KV]:
        """x (B, L, D), turned by its rotation; past S tokens; mask broadcastable to
        (B, Hq, L, S + L), past keys first, or to (B, Hq, L, L) where all of the past is seen, in
        the window if there is one.

        Returns y (B, L, D) and the keys and values of this call's L tokens alone.
        """
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q)[1].to(q.dtype), self.k_norm(k)[1].to(k.dtype)
        if self.has_rope:
            assert rotation is not None
            q, k = rotate(q, rotation), rotate(k, rotation)
        if self.window is not None:
            assert rotation is not None
            num_past = 0 if past is None else past.k.shape[1]
            mask = masks.within(mask, self.window, rotation.positions, num_past)
        if past is None:
            y = ops.attention(q, k, v, mask)
        else:
            y = ops.attention_after(q, past, (k, v), mask)
        return self.o_proj(y.flatten(2)), KV(k, v)
