"""The Mamba-2 mixer: in_proj, causal convolution, seeded scan, gated norm, out_proj."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.kernels import ssd
from twotower.kernels.mixing import TORCH, MambaWeights
from twotower.layers.norms import GatedRMSNorm
from twotower.specs import MambaSpec


class MambaState(NamedTuple):
    """What a Mamba layer knows of its past: the convolution's last inputs and the scan's state.

    conv (..., C, W-1), ssm (..., H, P, N) float32; leading: the rows, or rows and blocks.
    """

    conv: Tensor
    ssm: Tensor


class MambaInputs(NamedTuple):
    """What a Mamba layer took in after a state: enough to know the state after any of L tokens.

    conv (B, W-1+L, C) with the past in front; heads (B, L, H, P), dt (B, L, H), B (B, L, G, N) as
    the scan gets them; A (B, 1, H); ssm (B, H, P, N), the state before.
    """

    conv: Tensor
    heads: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    ssm: Tensor


def states_after(
    layers: Sequence[MambaInputs], counts: Tensor, most: int | None = None
) -> list[MambaState]:
    """Each layer's state after the first counts (B,) of its L tokens.

    most >= 1: no count is above it; where it is not given, the counts are asked. All layers at
    once: the arithmetic is little, and small models wait for its dispatch.
    Source: system.md section 4, 'Self-speculation', step 3.
    """
    if not layers:
        return []
    if most is None:
        most = max(*counts.tolist(), 1)
    heads, dt, A, B = (
        torch.cat([getattr(one, name)[:, :most] for one in layers])
        for name in ("heads", "dt", "A", "B")
    )
    counts = counts.to(dt.device)
    dt = dt * _is_valid(most, counts).unsqueeze(-1).repeat(len(layers), 1, 1)
    added, decay = (part.chunk(len(layers)) for part in ssd.state_change(heads, dt, A, B))
    width, ends = layers[0].conv.shape[1] - layers[0].dt.shape[1], counts.unsqueeze(1)
    return [
        MambaState(_windows(one.conv, ends, width).squeeze(1), ssm.addcmul_(one.ssm.float(), kept))
        for one, ssm, kept in zip(layers, added, decay, strict=True)
    ]


class Mamba2(nn.Module):
    """Mix L tokens, seeded with the state before them; any split of a sequence gives the same."""

    kernels = TORCH

    def __init__(self, width: int, spec: MambaSpec, eps: float) -> None:
        """eps: of the gated norm."""
        super().__init__()
        self.num_heads, self.head_dim = spec.num_heads, spec.head_dim
        self.num_groups, self.state_size = spec.num_groups, spec.state_size
        self.width, self.conv_width = spec.width, spec.conv_width
        channels = spec.conv_channels
        self.in_proj = nn.Linear(width, self.width + channels + self.num_heads, bias=spec.proj_bias)
        self.conv1d = nn.Conv1d(
            channels, channels, self.conv_width, groups=channels, bias=spec.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GatedRMSNorm(self.width, self.num_groups, eps)
        self.out_proj = nn.Linear(self.width, width, bias=spec.proj_bias)

    def forward(
        self, x: Tensor, past: MambaState | None, counts: Tensor | None, states_every: int | None
    ) -> tuple[Tensor, MambaState | MambaInputs]:
        """x (B, L, D); past with leading (B,), None for zeros; counts (B,): valid tokens per row.

        Returns y (B, L, D) and the states after every `states_every` tokens, with leading
        (B, L/states_every). With counts, `states_every` is L and the state is the one after each
        row's last valid token. With states_every None the caller does not know yet how many tokens
        will stay: it gets the inputs, of which any state can be made.
        """
        length = x.shape[1]
        z, xbc, dt = self.in_proj(x).split(
            [self.width, self.conv1d.in_channels, self.num_heads], dim=-1
        )
        window = self._with_past(xbc, past)
        weights = MambaWeights(
            self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log, self.D
        )
        sizes = self.num_heads, self.head_dim, self.num_groups, self.state_size
        seed = None if past is None else past.ssm
        is_valid = None if counts is None else _is_valid(length, counts)
        found = self.kernels.conv_scan(window, dt, weights, sizes, seed, is_valid, states_every)
        y = self.out_proj(self.norm(found.y.flatten(2), z))
        if states_every is None:
            assert seed is not None  # a cache's state, zeros at the start
            A = -self.A_log.float().exp().expand(len(x), 1, -1)
            return y, MambaInputs(window, found.heads, found.dt, A, found.B, seed)
        if counts is None:
            ends = torch.arange(states_every, length + 1, states_every, device=x.device)
            ends = ends.expand(len(x), -1)
        else:
            ends = counts.unsqueeze(1)
        assert found.ssm is not None
        return y, MambaState(_windows(window, ends, self.conv_width - 1), found.ssm)

    def _with_past(self, xbc: Tensor, past: MambaState | None) -> Tensor:
        """xbc (B, L, C) with the last W-1 inputs in front: (B, W-1+L, C)."""
        num_rows, _, channels = xbc.shape
        before = (
            xbc.new_zeros(num_rows, self.conv_width - 1, channels) if past is None else past.conv.mT
        )
        return torch.cat([before.to(xbc.dtype), xbc], dim=1)


def _windows(window: Tensor, ends: Tensor, width: int) -> Tensor:
    """The `width` inputs before each end: window (B, W-1+L, C), ends (B, n) -> (B, n, C, W-1)."""
    index = ends.unsqueeze(-1) + torch.arange(width, device=window.device)  # (B, n, W-1)
    rows = torch.arange(len(window), device=window.device)[:, None, None]
    return window[rows, index].mT


def _is_valid(length: int, counts: Tensor) -> Tensor:
    """Which of L tokens belong to each row: counts (B,) -> (B, L)."""
    return torch.arange(length, device=counts.device) < counts.unsqueeze(1)
