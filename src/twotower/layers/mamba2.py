"""The Mamba-2 mixer: in_proj, causal convolution, seeded scan, gated norm, out_proj."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.kernels import ops, ssd
from twotower.layers.norms import GatedRMSNorm


class MambaState(NamedTuple):
    """What a Mamba layer knows of its past: the convolution's last inputs and the scan's state.

    conv (..., C, W-1), ssm (..., H, P, N) float32; leading: the rows, or rows and blocks.
    """

    conv: Tensor
    ssm: Tensor


class Mamba2(nn.Module):
    """Mix L tokens, seeded with the state before them; any split of a sequence gives the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.num_groups, self.state_size = config.n_groups, config.ssm_state_size
        self.width, self.conv_width = config.mamba_width, config.conv_kernel
        channels = config.conv_channels
        self.in_proj = nn.Linear(
            config.hidden_size, self.width + channels + self.num_heads, bias=config.use_bias
        )
        self.conv1d = nn.Conv1d(
            channels, channels, self.conv_width, groups=channels, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GatedRMSNorm(self.width, self.num_groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(self.width, config.hidden_size, bias=config.use_bias)

    def forward(
        self, x: Tensor, past: MambaState | None, counts: Tensor | None, states_every: int
    ) -> tuple[Tensor, MambaState]:
        """x (B, L, D); past with leading (B,), None for zeros; counts (B,): valid tokens per row.

        Returns y (B, L, D) and the states after every `states_every` tokens, with leading
        (B, L/states_every). With counts, `states_every` is L and the state is the one after each
        row's last valid token.
        """
        length = x.shape[1]
        z, xbc, dt = self.in_proj(x).split(
            [self.width, self.conv1d.in_channels, self.num_heads], dim=-1
        )
        xbc, conv = self._with_past(xbc, past, counts, states_every)
        xbc = ops.causal_conv1d(xbc, self.conv1d.weight, self.conv1d.bias)
        heads, B, C = xbc.split([self.width, *2 * [self.num_groups * self.state_size]], dim=-1)
        heads = heads.unflatten(-1, (self.num_heads, self.head_dim)).float()
        B, C = (value.unflatten(-1, (self.num_groups, self.state_size)) for value in (B, C))
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if counts is not None:
            valid = torch.arange(length, device=x.device) < counts.unsqueeze(1)
            dt = dt * valid.unsqueeze(-1)
        seed = None if past is None else past.ssm
        A = -self.A_log.float().exp()
        y, ssm = ssd.ssd_scan(heads, dt, A, B, C, seed, states_every)
        # Rounded here, before the norm, and after the convolution: where the released code rounds.
        y = (y + heads * self.D.float().unsqueeze(-1)).to(x.dtype)
        return self.out_proj(self.norm(y.flatten(2), z)), MambaState(conv, ssm)

    def _with_past(
        self, xbc: Tensor, past: MambaState | None, counts: Tensor | None, states_every: int
    ) -> tuple[Tensor, Tensor]:
        """xbc with the last W-1 inputs in front, (B, W-1+L, C), and the new conv states.

        The states are (B, L/states_every, C, W-1).
        """
        num_rows, length, channels = xbc.shape
        kept = self.conv_width - 1
        before = xbc.new_zeros(num_rows, kept, channels) if past is None else past.conv.mT
        xbc = torch.cat([before.to(xbc.dtype), xbc], dim=1)
        if counts is None:
            ends = torch.arange(states_every, length + 1, states_every, device=xbc.device)
            ends = ends.expand(num_rows, -1)
        else:
            ends = counts.unsqueeze(1)
        index = ends.unsqueeze(-1) + torch.arange(kept, device=xbc.device)  # (B, n, W-1)
        rows = torch.arange(num_rows, device=xbc.device)[:, None, None]
        return xbc, xbc[rows, index].mT  # (B, n, C, W-1)
