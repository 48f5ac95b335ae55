"""Grouped-query attention without positional embedding."""

from typing import NamedTuple

from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.kernels import ops


class KV(NamedTuple):
    """Keys and values of S tokens, each (B, S, Hk, A)."""

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    """Attend to a past and to this call's own tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, width, bias=bias)

    def forward(self, x: Tensor, past: KV | None, mask: Tensor | None) -> tuple[Tensor, KV]:
        """x (B, L, D); past S tokens; mask broadcastable to (B, Hq, L, S + L), past keys first,
        or to (B, Hq, L, L) where all of the past is seen.

        Returns y (B, L, D) and the keys and values of this call's L tokens alone.
        """
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past is None:
            y = ops.attention(q, k, v, mask)
        else:
            y = ops.attention_after(q, past, (k, v), mask)
        return self.o_proj(y.flatten(2)), KV(k, v)
