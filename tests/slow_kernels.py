"""Slow loops that follow the equations word by word: the truth for tests, never run in models."""

import torch
from torch import Tensor


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    states_every: int,
) -> tuple[Tensor, Tensor]:
    """`ssd.ssd_scan` token by token and head by head, in the inputs' own dtype."""
    num_rows, length, num_heads, head_dim = x.shape
    heads_per_group = num_heads // B.shape[2]
    state = x.new_zeros(num_rows, num_heads, head_dim, B.shape[-1]) if initial is None else initial
    outputs, states = [], []
    for token in range(length):
        heads = []
        for head in range(num_heads):
            group = head // heads_per_group
            step = dt[:, token, head, None, None]
            added = x[:, token, head, :, None] * B[:, token, group, None, :]
            heads.append((step * A[head]).exp() * state[:, head] + step * added)
        state = torch.stack(heads, dim=1)
        readout = C[:, token].repeat_interleave(heads_per_group, dim=1).unsqueeze(-1)
        outputs.append((state @ readout).squeeze(-1))
        if (token + 1) % states_every == 0:
            states.append(state)
    return torch.stack(outputs, dim=1), torch.stack(states, dim=1)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`ops.causal_conv1d` token by token."""
    width = weight.shape[-1]
    rows = []
    for token in range(x.shape[1] - width + 1):
        window = x[:, token : token + width]  # (B, W, C)
        y = torch.einsum("bwc,cw->bc", window, weight.squeeze(1))
        y = y if bias is None else y + bias
        rows.append(y * torch.sigmoid(y))
    return torch.stack(rows, dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`ops.attention` query by query and head by head; mask broadcastable to (B, Hq, L, S)."""
    num_rows, length, num_heads, head_dim = q.shape
    heads_per_kv = num_heads // k.shape[2]
    y = torch.zeros_like(q)
    allowed = None if mask is None else mask.expand(num_rows, num_heads, length, k.shape[1])
    for row in range(num_rows):
        for head in range(num_heads):
            for query in range(length):
                scores = k[row, :, head // heads_per_kv] @ q[row, query, head] / head_dim**0.5
                if allowed is not None:
                    scores = scores.masked_fill(~allowed[row, head, query], float("-inf"))
                y[row, query, head] = scores.softmax(0) @ v[row, :, head // heads_per_kv]
    return y
