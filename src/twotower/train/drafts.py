"""What a thin denoiser learns from rows: to draft a block from its first token and masks.

Context states are computed anew in every step, so its layers may read any state, a Mamba layer's
too. `twotower adapt` caches what a denoiser of attention layers reads, for backbones that are slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.diffusion.loss import masked_loss_sum
from twotower.model.two_tower import TwoTower
from twotower.train.data import Batch
from twotower.train.objective import Inputs, Noise, choose_blocks
from twotower.train.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class CleanBlocks(Inputs):
    """Rows `context` (B, K*T) and N blocks of each to draft: `index` (B, N) says which; `clean`
    (B, N*(T-1)) are their tokens but the first, `weight` what each adds to the loss.
    """

    context: Tensor
    index: Tensor
    clean: Tensor
    weight: Tensor


class DraftedBlocks:
    """A thin denoiser predicts all tokens of a block but the first, at once. Nearer ones weigh
    more, and those behind the end of a target none: a token counts only if all before it do.
    """

    weights = (1.0,)

    def __init__(self, options: TrainOptions, block_size: int) -> None:
        self._options, self._block_size = options, block_size
        sums: Callable[..., Tensor] = draft_sum
        self._sum = torch.compile(sums) if options.compile else sums

    def draw(self, batch: Batch, noise: Noise) -> CleanBlocks:
        """Blocks of the rows, of which as many as wanted begin with two targets or more."""
        options, size = self._options, self._block_size
        is_target = batch.is_completion
        if options.targets == "all":
            is_target = torch.ones_like(is_target)
        tokens, targets = (x.unflatten(1, (-1, size)) for x in (batch.tokens, is_target))
        num_rows, num_blocks, _ = tokens.shape
        count = options.denoised_blocks_per_row or num_blocks
        index = choose_blocks(targets[:, :, :2].all(2), count, noise(num_blocks))
        rows = torch.arange(num_rows).unsqueeze(1)
        near = torch.exp(-torch.arange(size - 1) / options.loss_decay)
        weight = targets[rows, index].cumprod(2)[:, :, 1:] * near
        return CleanBlocks(
            context=batch.tokens,
            index=index,
            clean=tokens[rows, index][:, :, 1:].flatten(1),
            weight=weight.flatten(1),
            counts=weight.sum().unsqueeze(0),
        )

    def loss_sums(self, model: TwoTower, inputs: CleanBlocks) -> Tensor:
        """(1,): the cross-entropy of the drafted tokens, weighted."""
        return self._sum(model, inputs, self._block_size).unsqueeze(0)


def draft_sum(model: TwoTower, blocks: CleanBlocks, block_size: int) -> Tensor:
    """The loss sum of `DraftedBlocks`."""
    logits = model.draft_logits(blocks.context, block_size, blocks.index).flatten(1, 2)
    return masked_loss_sum(logits, blocks.clean, blocks.weight > 0, blocks.weight)
