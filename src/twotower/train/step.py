"""The loss of each recipe, and the randomness of a step.

Decides what a batch is scored on. Step k's random numbers are a function of (seed, k, pass), so a
resumed run needs no generator state to repeat them. Autocast, gradients and the optimiser are the
loop's business.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from twotower.diffusion.loss import masked_cross_entropy, token_cross_entropy
from twotower.diffusion.noise import corrupt
from twotower.model.two_tower import TwoTower
from twotower.train.options import Recipe

MIN_T = 1e-3  # a row with t = 0 would have nothing to learn from
Loss = Callable[[TwoTower, Tensor, torch.Generator], Tensor]  # tokens (B, L) -> mean nats, scalar


def make_loss(recipe: Recipe, block_size: int, compile: bool) -> Loss:
    """The loss of a recipe. With `compile`, what the model computes is compiled; the noise is
    not.
    """
    if recipe == "backbone":
        next_token = torch.compile(next_token_loss) if compile else next_token_loss

        def backbone(model: TwoTower, tokens: Tensor, generator: torch.Generator) -> Tensor:
            return next_token(model, tokens)

        return backbone
    block = torch.compile(block_loss) if compile else block_loss

    def denoiser(model: TwoTower, tokens: Tensor, generator: torch.Generator) -> Tensor:
        t, noisy, is_masked = corrupt_rows(tokens, model.config.mask_token_id, generator)
        return block(model, tokens, noisy, is_masked, t, block_size)

    return denoiser


def step_generator(seed: int, step: int, micro: int) -> torch.Generator:
    """Random numbers for pass `micro` of step `step`: on the CPU, so equal for every device."""
    state = np.random.SeedSequence([seed, step, micro]).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def next_token_loss(model: TwoTower, tokens: Tensor) -> Tensor:
    """Token i predicts token i + 1 through the context tower: tokens (B, L) -> scalar."""
    # The last position predicts nothing, but whole rows keep the scan's tiles even.
    logits = model.context_logits(tokens)[:, :-1]
    return token_cross_entropy(logits, tokens[:, 1:]).mean()


def block_loss(
    model: TwoTower, clean: Tensor, noisy: Tensor, is_masked: Tensor, t: Tensor, block_size: int
) -> Tensor:
    """Cross-entropy of the clean tokens at masked positions: all (B, K*T), t (B,) -> scalar."""
    logits = model.training_logits(clean, noisy, t, block_size)
    return masked_cross_entropy(logits, clean, is_masked)


def corrupt_rows(
    tokens: Tensor, mask_token_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw t ~ U[0.001, 1] per row and mask tokens (B, L) with probability t.

    Returns t (B,), the noisy tokens (B, L) and is_masked (B, L). Source: system.md section 5.
    """
    t = MIN_T + (1.0 - MIN_T) * torch.rand(len(tokens), generator=generator)
    noisy, is_masked = corrupt(tokens, t.to(tokens.device), mask_token_id, generator)
    return t.to(tokens.device), noisy, is_masked
