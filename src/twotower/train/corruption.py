"""Which blocks of a batch the denoiser is trained on, and what of them is masked.

Decides the distribution of tasks; the masking itself is diffusion.noise.corrupt. All randomness
comes from one generator on the CPU, so that a step is the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.diffusion.noise import corrupt
from twotower.train.denoiser_options import DenoiserOptions
from twotower.train.processes import Part

MIN_T = 1e-3  # a block with t = 0 would have nothing to learn from


@dataclass(frozen=True, kw_only=True)
class NoisyBlocks:
    """Blocks to denoise: `index` (B, N) says which of a row's blocks, the rest is (B, N*T).

    `t` is what the denoiser is told: (B,), (B, N) or None. `sampled_t` (B, N) is the probability
    with which tokens were masked, which the ELBO weight needs. Of one process's rows of a batch,
    `masked_share` and `row_share` say how much of it is theirs; None and 1 where it is all.
    """

    index: Tensor
    clean: Tensor
    noisy: Tensor
    is_masked: Tensor
    t: Tensor | None
    sampled_t: Tensor
    masked_share: Tensor | None = None
    row_share: float = 1.0

    def part(self, part: Part) -> NoisyBlocks:
        """The rows of one process; with weight 0, rows that count nothing."""
        rows = part.rows
        masked = self.is_masked[rows].sum() if part.weight else torch.tensor(0)
        return NoisyBlocks(
            index=self.index[rows],
            clean=self.clean[rows],
            noisy=self.noisy[rows],
            is_masked=self.is_masked[rows],
            t=None if self.t is None else self.t[rows],
            sampled_t=self.sampled_t[rows],
            masked_share=masked / self.is_masked.sum().clamp(min=1),
            row_share=part.weight,
        )


def corrupt_blocks(
    tokens: Tensor,
    is_target: Tensor,
    mask_token_id: int,
    block_size: int,
    options: DenoiserOptions,
    generator: torch.Generator,
) -> NoisyBlocks:
    """Choose blocks of tokens (B, K*T) and mask targets in them; is_target (B, K*T) bool.

    Source: system.md section 5; the shares and choices beyond it are DenoiserOptions' fields.
    """
    blocks, targets = (part.unflatten(1, (-1, block_size)) for part in (tokens, is_target))
    count = options.blocks_per_row or blocks.shape[1]
    if options.blocks_per_row is None:
        index = torch.arange(count, device=tokens.device).expand(len(tokens), -1)
    else:
        index = choose_blocks(targets.any(2), count, generator)
    rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    clean, targets = blocks[rows, index], targets[rows, index]  # (B, N, T)
    t = draw_t(index.shape, options, generator).to(tokens.device)
    given = _draws(index.shape, options.first_given_share, generator).to(tokens.device)
    targets = targets.clone()
    targets[:, :, 0] &= ~given
    per_token = t.unsqueeze(2).expand(targets.shape).flatten(1)
    noisy, is_masked = corrupt(
        clean.flatten(1), per_token, mask_token_id, generator, targets.flatten(1)
    )
    return NoisyBlocks(
        index=index,
        clean=clean.flatten(1),
        noisy=noisy,
        is_masked=is_masked,
        t=_conditioning(t, is_masked, options),
        sampled_t=t,
    )


def choose_blocks(has_target: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` block numbers per row, (B, count): blocks with a target in random order, repeated
    when they are fewer, each time with other noise; a row without any gives random blocks.
    has_target (B, K) bool.
    """
    keys = torch.rand(has_target.shape, generator=generator).to(has_target.device)
    order = (keys - 2.0 * has_target).argsort(dim=1)  # those with targets first
    available = has_target.sum(1, keepdim=True)
    available = torch.where(available > 0, available, has_target.shape[1])
    turn = torch.arange(count, device=has_target.device) % available
    return order.gather(1, turn)


def draw_t(shape: torch.Size, options: DenoiserOptions, generator: torch.Generator) -> Tensor:
    """t (B, N): uniform in [0.001, 1] per row or per block, and 1 for a share of the blocks."""
    num_rows, num_blocks = shape
    drawn = num_blocks if options.t_per == "block" else 1
    t = MIN_T + (1.0 - MIN_T) * torch.rand(num_rows, drawn, generator=generator)
    t = t.expand(num_rows, num_blocks)
    return torch.where(_draws(shape, options.draft_share, generator), 1.0, t)


def _draws(shape: torch.Size, share: float, generator: torch.Generator) -> Tensor:
    """True with probability `share`; a share of 0 takes no random numbers."""
    if share == 0.0:
        return torch.zeros(shape, dtype=torch.bool)
    return torch.rand(shape, generator=generator) < share


def _conditioning(t: Tensor, is_masked: Tensor, options: DenoiserOptions) -> Tensor | None:
    if options.condition_on == "nothing":
        return None
    if options.condition_on == "t":
        return t if options.t_per == "block" or options.draft_share > 0.0 else t[:, 0]
    fraction: Tensor = is_masked.unflatten(1, (t.shape[1], -1)).float().mean(2)
    return fraction
