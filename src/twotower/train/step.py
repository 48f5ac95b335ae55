"""The loss of each recipe, and the randomness of a step.

Decides what a batch is scored on. Step k's random numbers are a function of (seed, k, pass), so a
resumed run needs no generator state to repeat them; each of several processes draws those of the
whole batch and then takes its rows. Autocast, gradients and the optimiser are the loop's business.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from twotower.diffusion.loss import elbo_weight, masked_cross_entropy, token_cross_entropy
from twotower.model.two_tower import TwoTower
from twotower.train.corruption import NoisyBlocks, corrupt_blocks
from twotower.train.data import Batch
from twotower.train.options import TrainOptions
from twotower.train.processes import ALONE, Processes

# batch -> mean nats, a scalar; of several processes, this one's share of the batch's mean
Loss = Callable[[TwoTower, Batch, torch.Generator], Tensor]


def make_loss(
    options: TrainOptions,
    block_size: int,
    compile: bool,
    ar_weight: float = 0.0,
    processes: Processes = ALONE,
) -> Loss:
    """The loss of a recipe; a denoiser's may add the context tower's next-token loss.

    With `compile`, what the model computes is compiled; the noise is not.
    """
    if options.recipe == "backbone":
        next_token = torch.compile(next_token_loss) if compile else next_token_loss

        def backbone(model: TwoTower, batch: Batch, generator: torch.Generator) -> Tensor:
            rows, weight = processes.part(len(batch.tokens))
            return next_token(model, batch.tokens[rows]) * weight

        return backbone
    block = torch.compile(block_loss) if compile else block_loss

    def denoiser(model: TwoTower, batch: Batch, generator: torch.Generator) -> Tensor:
        mask_token_id = model.config.mask_token_id
        is_target = batch.is_completion
        if options.targets == "all":
            is_target = torch.ones_like(is_target)
        blocks = corrupt_blocks(
            batch.tokens, is_target, mask_token_id, block_size, options, generator
        )
        context, weight = batch.tokens, None
        if processes.count > 1:
            part = processes.part(len(context))
            blocks, context = blocks.part(part), context[part.rows]
        if options.loss_weight == "elbo":
            weight = elbo_weight("linear", blocks.sampled_t).repeat_interleave(block_size, dim=1)
        return block(model, context, blocks, block_size, weight, ar_weight)

    return denoiser


def step_generator(seed: int, step: int, micro: int) -> torch.Generator:
    """Random numbers for pass `micro` of step `step`: on the CPU, so equal for every device."""
    state = np.random.SeedSequence([seed, step, micro]).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def next_token_loss(model: TwoTower, tokens: Tensor) -> Tensor:
    """Token i predicts token i + 1 through the context tower: tokens (B, L) -> scalar."""
    # The last position predicts nothing, but whole rows keep the scan's tiles even.
    return _shifted_cross_entropy(model.context_logits(tokens), tokens)


def block_loss(
    model: TwoTower,
    context: Tensor,
    blocks: NoisyBlocks,
    block_size: int,
    weight: Tensor | None,
    ar_weight: float = 0.0,
) -> Tensor:
    """Cross-entropy of the clean tokens at masked positions: context (B, K*T) -> scalar.

    weight (B, N*T): with it, the weighted sum over all N*T positions of the chosen blocks.
    ar_weight: what the context head's next-token loss on the same pass over context adds.
    """
    inputs = (context, blocks.noisy, blocks.t, block_size, blocks.index)
    if ar_weight == 0.0:
        return _denoising_loss(model.training_logits(*inputs), blocks, weight)
    logits, next_logits = model.joint_logits(*inputs)
    next_token = _shifted_cross_entropy(next_logits, context)
    return _denoising_loss(logits, blocks, weight) + ar_weight * blocks.row_share * next_token


def _denoising_loss(logits: Tensor, blocks: NoisyBlocks, weight: Tensor | None) -> Tensor:
    """The mean over a batch, or these rows' share of it."""
    mean = masked_cross_entropy(logits, blocks.clean, blocks.is_masked, weight)
    if blocks.masked_share is None:
        return mean
    # The plain mean is one over masked tokens, of which rows have uneven numbers.
    return mean * (blocks.masked_share if weight is None else blocks.row_share)


def _shifted_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits after token i score token i + 1: (B, L, V), (B, L) -> scalar."""
    return token_cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()
