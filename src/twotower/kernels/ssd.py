"""The Mamba-2 recurrence as matrix products (state-space duality), differentiable, any device.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,    y_t = S_t C_t    (per head; system.md section 2)

The sequence is cut into tiles; within a tile the recurrence is a masked product, between tiles
only the state travels. The tile size is a matter of speed alone: `states_every` and L may be
anything from 1 up.
"""

import torch
from torch import Tensor

TILE = 64  # longest tile: the products grow with its square, the number of states with its inverse


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    states_every: int,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over L tokens in float32.

    x (B, L, H, P); dt (B, L, H) after softplus; A (H,) < 0; B, C (B, L, G, N); initial
    (B, H, P, N) or None for zeros. Returns y (B, L, H, P) and the states after every
    `states_every` tokens (B, L/states_every, H, P, N), both float32. A token with dt = 0 leaves
    the state as it is.
    Raises ValueError if states_every does not divide L. Source: arXiv 2405.21060 section 6.
    """
    num_rows, length, num_heads, head_dim = x.shape
    if states_every < 1 or length % states_every:
        raise ValueError(f"states_every={states_every} must divide the {length} tokens of the call")
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C = (value.float() for value in (x, dt, A, B, C))
        if initial is None:
            initial = x.new_zeros(num_rows, num_heads, head_dim, B.shape[-1])
        if length == 1:
            return _step(x, dt, A, B, C, initial.float())
        return _tiled(x, dt, A, B, C, initial.float(), states_every)


def ssd_outputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None
) -> Tensor:
    """The y of `ssd_scan` for a caller that has no use for states, which one tile need not make."""
    length = x.shape[1]
    if initial is None or not 1 < length <= TILE:
        return ssd_scan(x, dt, A, B, C, initial, length)[0]
    with torch.autocast(x.device.type, enabled=False):
        x, dt, B, C = (value.float().unsqueeze(1) for value in (x, dt, B, C))  # one tile
        x, B, C, log_decay = _prepare(x, dt, A.float(), B, C)
        return _outputs(x, B, C, log_decay, initial.float().unsqueeze(1)).squeeze(1)


def state_change(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """What L tokens do to a state: it is multiplied by the second result, then the first is added.

    Arguments as in `ssd_scan`, A also (B, 1, H). Returns (B, H, P, N) and (B, H, 1, 1), float32.
    """
    num_rows, _, num_heads, head_dim = x.shape
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B = (value.float() for value in (x, dt, A, B))
        log_decay = (dt * A).cumsum(1)  # (B, L, H): from the start through token i
        last = log_decay[:, -1:]
        x = x * (dt * (last - log_decay).exp()).unsqueeze(-1)
        by_group = x.unflatten(2, (B.shape[2], -1)).flatten(3).permute(0, 2, 3, 1)
        added = by_group @ B.transpose(1, 2)  # (B, G, H/G*P, L) @ (B, G, L, N)
        decay: Tensor = last.exp().view(num_rows, num_heads, 1, 1)
        return added.view(num_rows, num_heads, head_dim, -1), decay


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence as written."""
    num_rows, _, num_heads, head_dim = x.shape
    num_groups, state_size = B.shape[2:]
    decay = (dt * A).exp().view(num_rows, num_heads, 1, 1)
    heads_x = (x * dt.unsqueeze(-1)).view(num_rows, num_groups, -1, 1)  # (B, G, H/G*P, 1)
    added = heads_x * B.view(num_rows, num_groups, 1, state_size)
    state = initial * decay + added.view(num_rows, num_heads, head_dim, state_size)
    flat = state.view(num_rows, num_groups, -1, state_size)
    y = flat @ C.view(num_rows, num_groups, state_size, 1)
    return y.view(x.shape), state.unsqueeze(1)


def _tiled(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, states_every: int
) -> tuple[Tensor, Tensor]:
    length = x.shape[1]
    tiles_per_state = -(-states_every // TILE)
    tile = -(-states_every // tiles_per_state)
    x, dt, B, C = (_to_tiles(v, states_every, tiles_per_state, tile) for v in (x, dt, B, C))
    y, states = _scan_tiles(x, dt, A, B, C, initial)
    y = y.unflatten(1, (-1, tiles_per_state)).flatten(2, 3)[:, :, :states_every]
    return y.flatten(1, 2)[:, :length], states[:, tiles_per_state - 1 :: tiles_per_state]


def _to_tiles(value: Tensor, states_every: int, tiles_per_state: int, tile: int) -> Tensor:
    """(B, L, ...) -> (B, tiles, tile, ...); zeros pad each stretch of states_every tokens."""
    value = value.unflatten(1, (-1, states_every))
    if padding := tiles_per_state * tile - states_every:
        value = torch.cat(
            [value, value.new_zeros(*value.shape[:2], padding, *value.shape[3:])], dim=2
        )
    tiles: Tensor = value.flatten(1, 2).unflatten(1, (-1, tile))
    return tiles


def _scan_tiles(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """x (B, n, Q, H, P), dt (B, n, Q, H), B, C (B, n, Q, G, N) -> y like x, states after tiles.

    The states are (B, n, H, P, N).
    """
    num_groups, head_dim = B.shape[3], x.shape[4]
    x, B, C, log_decay = _prepare(x, dt, A, B, C)
    to_end = (log_decay[..., -1:] - log_decay).exp().transpose(2, 3).unsqueeze(-1)
    by_group = (x * to_end).unflatten(3, (num_groups, -1)).flatten(4).transpose(2, 3)
    added = (B.mT @ by_group).unflatten(4, (-1, head_dim))  # (B, n, G, N, H/G, P)
    added = added.permute(0, 1, 2, 4, 5, 3).flatten(2, 3)  # (B, n, H, P, N)

    before, states = _pass_states(added, log_decay[..., -1].exp(), initial)
    return _outputs(x, B, C, log_decay, before), states


def _prepare(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt * x; B and C as (B, n, G, Q, N); the log decay from a tile's start through each token."""
    log_decay = (dt * A).cumsum(2).transpose(2, 3)  # (B, n, H, Q)
    return x * dt.unsqueeze(-1), B.transpose(2, 3), C.transpose(2, 3), log_decay


def _outputs(x: Tensor, B: Tensor, C: Tensor, log_decay: Tensor, before: Tensor) -> Tensor:
    """What tiles put out, (B, n, Q, H, P), from `_prepare`'s results and the states before them."""
    num_groups, head_dim = B.shape[2], x.shape[4]
    within = _decayed_products(log_decay, B, C) @ x.transpose(2, 3)  # (B, n, H, Q, P)
    carried = before.unflatten(2, (num_groups, -1)).flatten(3, 4)  # (B, n, G, H/G*P, N)
    carried = (C @ carried.mT).unflatten(4, (-1, head_dim)).transpose(3, 4).flatten(2, 3)
    y = torch.addcmul(within, carried, log_decay.exp().unsqueeze(-1))  # (B, n, H, Q, P)
    return y.transpose(2, 3)


def _decayed_products(log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """(C_i . B_j) exp(sum of dt A over j < k <= i) for j <= i, else 0: (B, n, H, Q, Q)."""
    span = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)
    # A past token's span is never above 0; a future one's may be, and its exponential overflow.
    decay: Tensor = span.clamp(max=0.0).exp().tril().unflatten(2, (B.shape[2], -1))
    # (B, n, G, H/G, Q, Q)
    return (decay * (C @ B.mT).unsqueeze(3)).flatten(2, 3)


def _pass_states(added: Tensor, decay: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The state before and after each tile, both of added's shape.

    added (B, n, H, P, N), decay (B, n, H), initial (B, H, P, N).
    """
    states = [initial]
    for tile in range(added.shape[1]):
        states.append(states[-1] * decay[:, tile, :, None, None] + added[:, tile])
    return torch.stack(states[:-1], dim=1), torch.stack(states[1:], dim=1)
