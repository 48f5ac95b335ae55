"""Who may attend to whom: boolean masks, True = may attend.

Every mask that the towers use is built here, and None stands for "no mask needed". Keys are always
the past first, then this call's own tokens. A past begins at position 0; what pads it stands behind
it and is hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal(num_queries: int, num_past: int, device: torch.device | None = None) -> Tensor | None:
    """Every query sees the past, itself and earlier tokens: (L, S + L), or None for L = 1."""
    if num_queries == 1:
        return None
    query = torch.arange(num_queries, device=device).unsqueeze(1) + num_past
    return torch.arange(num_past + num_queries, device=device) <= query


def past_of_rows(lengths: Tensor, num_past: int) -> Tensor:
    """Which of the S stored past keys belong to each row: lengths (B,) -> (B, 1, 1, S)."""
    return (torch.arange(num_past, device=lengths.device) < lengths.unsqueeze(1))[:, None, None]


def causal_rows(num_queries: int, lengths: Tensor, num_past: int) -> Tensor:
    """`causal` for rows whose past differs in length: lengths (B,) -> (B, 1, L, S + L)."""
    own = torch.ones(num_queries, num_queries, dtype=torch.bool, device=lengths.device).tril()
    return tree_rows(own.expand(len(lengths), 1, -1, -1), lengths, num_past)


def tree_rows(own: Tensor, lengths: Tensor, num_past: int) -> Tensor:
    """Drafts that branch, own (B, 1, L, L), behind their row's past: (B, 1, L, S + L)."""
    past = past_of_rows(lengths, num_past).expand(-1, -1, own.shape[2], -1)
    return torch.cat([past, own], dim=-1)


def full_rows(num_queries: int, lengths: Tensor, num_past: int) -> Tensor:
    """A block that sees its row's past and all of itself: lengths (B,) -> (B, 1, 1, S + T)."""
    past = past_of_rows(lengths, num_past)
    own = torch.ones(len(lengths), 1, 1, num_queries, dtype=torch.bool, device=lengths.device)
    return torch.cat([past, own], dim=-1)


def block_causal(starts: Tensor, num_past: int, block_size: int) -> Tensor:
    """Noisy blocks that begin at tokens `starts` (B, N) of their rows see all clean tokens before
    and themselves.

    Returns (B, 1, N*T, num_past + N*T), columns clean then noisy. Source: system.md section 5.
    """
    own = torch.arange(starts.shape[1], device=starts.device).repeat_interleave(block_size)
    before = starts.repeat_interleave(block_size, dim=1).unsqueeze(2)  # (B, N*T, 1)
    clean = torch.arange(num_past, device=starts.device) < before
    same = (own.unsqueeze(0) == own.unsqueeze(1)).expand(len(starts), -1, -1)
    return torch.cat([clean, same], dim=2).unsqueeze(1)


def within(mask: Tensor | None, window: int, positions: Tensor, num_past: int) -> Tensor | None:
    """A mask (..., S + L), or (..., L) where all of the S past keys are seen, without the keys that
    are `window` or more positions before their query: positions (B or 1, L) of the L tokens.
    """
    length = positions.shape[1]
    if num_past + length <= window:
        return mask
    past = torch.arange(num_past, device=positions.device).expand(len(positions), -1)
    keys = torch.cat([past, positions], dim=1).unsqueeze(1)
    near = (keys > positions.unsqueeze(2) - window).unsqueeze(1)  # (B or 1, 1, L, S + L)
    if mask is None:
        return near
    if mask.shape[-1] == length:
        mask = F.pad(mask, (num_past, 0), value=True)
    return mask & near
