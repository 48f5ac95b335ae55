"""What a step learns from rows: the one seam between the loop and a kind of training.

An `Objective` draws inputs from rows (all that is random, on the CPU) and gives loss sums of a
model on them. The loop divides each sum once, by the count of its tokens over all passes and
processes of the step, so that the split into passes and processes changes no gradient. Noise
belongs to the row: it is a function of (seed, step, number of the row in the training order).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from twotower.diffusion.loss import elbo_weight, masked_loss_sum, token_cross_entropy
from twotower.diffusion.noise import corrupt
from twotower.model.two_tower import TwoTower
from twotower.train.data import Batch
from twotower.train.options import DiffusionObjectiveOptions

MIN_T = 1e-3  # a block with t = 0 would have nothing to learn from
Noise = Callable[[int], Tensor]  # how many -> uniform random numbers in [0, 1) for each row (B, n)
InputsT = TypeVar("InputsT", bound="Inputs")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a model is shown and scored on, of some rows of a step. `counts`: how many tokens stand
    behind each loss term, (terms,) on the CPU.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(0))

    def to(self, device: str) -> Self:
        """The same on a device."""
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "counts"
        }
        return dataclasses.replace(self, **moved)


class Objective(Protocol[InputsT]):
    """A kind of training. The loss is the sum over terms of weight * sum / count."""

    @property
    def weights(self) -> tuple[float, ...]:
        """What each loss term weighs."""

    def draw(self, batch: Batch, noise: Noise) -> InputsT:
        """The inputs of some rows; whatever is random comes from `noise`."""

    def loss_sums(self, model: TwoTower, inputs: InputsT) -> Tensor:
        """The sum of each loss term over its tokens: (terms,) float32."""


def row_noise(seed: int, step: int, rows: Sequence[int]) -> Noise:
    """Random numbers of rows, by their numbers: the same on every device and in any company."""

    def draw(count: int) -> Tensor:
        uniform = torch.empty(len(rows), count)
        for place, row in enumerate(rows):
            state = np.random.SeedSequence([seed, step, row]).generate_state(2)
            generator = torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
            torch.rand(count, generator=generator, out=uniform[place])
        return uniform

    return draw


@dataclass(frozen=True, kw_only=True)
class Tokens(Inputs):
    """Rows (B, L) of which every token but the first is predicted."""

    tokens: Tensor


class NextToken:
    """Token i predicts token i + 1 through the context tower."""

    weights = (1.0,)

    def __init__(self, compile: bool = False) -> None:
        self._sum = torch.compile(next_token_sum) if compile else next_token_sum

    def draw(self, batch: Batch, noise: Noise) -> Tokens:
        """All of the rows; nothing is random."""
        num_rows, length = batch.tokens.shape
        return Tokens(tokens=batch.tokens, counts=torch.tensor([num_rows * (length - 1)]))

    def loss_sums(self, model: TwoTower, inputs: Tokens) -> Tensor:
        """(1,): the cross-entropy of every token but the first."""
        return self._sum(model, inputs.tokens).unsqueeze(0)


def next_token_sum(model: TwoTower, tokens: Tensor) -> Tensor:
    """Nats of the tokens (B, L) after the first, added up."""
    # The last position predicts nothing, but whole rows keep the scan's tiles even.
    return _shifted_sum(model.context_logits(tokens), tokens)


def _shifted_sum(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits after token i score token i + 1: (B, L, V), (B, L) -> scalar."""
    return token_cross_entropy(logits[:, :-1], tokens[:, 1:]).sum()


@dataclass(frozen=True, kw_only=True)
class NoisyBlocks(Inputs):
    """Rows `context` (B, K*T) and N blocks of each to denoise: `index` (B, N) says which, the rest
    is (B, N*T).

    `t` conditions the denoiser on time: (B,), (B, N) or None; `weight` (B, N*T) is the weight of
    each loss, or None.
    """

    context: Tensor
    index: Tensor
    clean: Tensor
    noisy: Tensor
    is_masked: Tensor
    t: Tensor | None
    weight: Tensor | None


class MaskedBlocks:
    """The denoiser predicts the masked tokens of all blocks at once. Source: system.md section 5.

    ar_weight: of the context head's next-token loss on the same pass over the rows, if above 0.
    """

    def __init__(
        self,
        options: DiffusionObjectiveOptions,
        block_size: int,
        mask_token_id: int,
        ar_weight: float = 0.0,
        compile: bool = False,
    ) -> None:
        self.weights = (1.0,) if ar_weight == 0.0 else (1.0, ar_weight)
        self.block_size = block_size
        self._options = options
        self._mask_token_id = mask_token_id
        self._sums = torch.compile(block_sums) if compile else block_sums

    def draw(self, batch: Batch, noise: Noise) -> NoisyBlocks:
        """Blocks of the rows, masked."""
        is_target = batch.is_completion
        if self._options.targets == "all":
            is_target = torch.ones_like(is_target)
        blocks = corrupt_blocks(
            batch.tokens, is_target, noise, self._mask_token_id, self.block_size, self._options
        )
        masked, (num_rows, length) = blocks.is_masked, batch.tokens.shape
        count = int(masked.sum()) if blocks.weight is None else masked.numel()
        counts = torch.tensor([count, num_rows * (length - 1)][: len(self.weights)])
        return dataclasses.replace(blocks, counts=counts)

    def loss_sums(self, model: TwoTower, inputs: NoisyBlocks) -> Tensor:
        """(1,) or (2,): cross-entropy of the masked tokens, and of the rows' next tokens."""
        return self._sums(model, inputs, self.block_size, len(self.weights) == 2)


def block_sums(
    model: TwoTower, blocks: NoisyBlocks, block_size: int, has_next_token: bool
) -> Tensor:
    """The loss sums of `MaskedBlocks`."""
    inputs = (blocks.context, blocks.noisy, blocks.t, block_size, blocks.index)
    scored = (blocks.clean, blocks.is_masked, blocks.weight)
    if not has_next_token:
        return masked_loss_sum(model.training_logits(*inputs), *scored).unsqueeze(0)
    logits, next_logits = model.joint_logits(*inputs)
    return torch.stack(
        [masked_loss_sum(logits, *scored), _shifted_sum(next_logits, blocks.context)]
    )


def corrupt_blocks(
    tokens: Tensor,
    is_target: Tensor,
    noise: Noise,
    mask_token_id: int,
    block_size: int,
    options: DiffusionObjectiveOptions,
) -> NoisyBlocks:
    """Choose blocks of tokens (B, K*T) and mask targets in them; is_target (B, K*T) bool."""
    blocks, targets = (part.unflatten(1, (-1, block_size)) for part in (tokens, is_target))
    num_rows, num_blocks, _ = blocks.shape
    count = options.denoised_blocks_per_row or num_blocks
    keys, rates, full, visible, uniform = noise(num_blocks + count * (3 + block_size)).split(
        [num_blocks, count, count, count, count * block_size], dim=1
    )
    if options.denoised_blocks_per_row is None:
        index = torch.arange(count).expand(num_rows, -1)
    else:
        index = choose_blocks(targets.any(2), count, keys)
    rows = torch.arange(num_rows).unsqueeze(1)
    clean, targets = blocks[rows, index], targets[rows, index].clone()  # (B, N, T)
    t = draw_t(rates, full, options)
    targets[:, :, 0] &= visible >= options.first_token_visible_fraction
    per_token = t.repeat_interleave(block_size, dim=1)
    noisy, is_masked = corrupt(
        clean.flatten(1), per_token, mask_token_id, uniform, targets.flatten(1)
    )
    return NoisyBlocks(
        context=tokens,
        index=index,
        clean=clean.flatten(1),
        noisy=noisy,
        is_masked=is_masked,
        t=_conditioning(t, is_masked, options),
        weight=elbo_weight("linear", per_token) if options.loss_weight == "elbo" else None,
    )


def choose_blocks(has_target: Tensor, count: int, keys: Tensor) -> Tensor:
    """`count` block numbers per row, (B, count): blocks with a target in random order, repeated
    when they are fewer, each time with other noise; a row without any gives random blocks.
    has_target (B, K) bool; keys (B, K) random numbers.
    """
    order = (keys - 2.0 * has_target).argsort(dim=1)  # those with targets first
    available = has_target.sum(1, keepdim=True)
    available = torch.where(available > 0, available, has_target.shape[1])
    turn = torch.arange(count) % available
    return order.gather(1, turn)


def draw_t(rates: Tensor, full: Tensor, options: DiffusionObjectiveOptions) -> Tensor:
    """t (B, N): uniform in [0.001, 1] per row or block, and 1 for a fraction; of random numbers."""
    if options.mask_rate_per == "row":
        rates = rates[:, :1].expand_as(rates)
    return torch.where(full < options.fully_masked_fraction, 1.0, MIN_T + (1.0 - MIN_T) * rates)


def _conditioning(
    t: Tensor, is_masked: Tensor, options: DiffusionObjectiveOptions
) -> Tensor | None:
    if options.condition_on == "none":
        return None
    if options.condition_on == "t":
        differs = options.mask_rate_per == "block" or options.fully_masked_fraction > 0.0
        return t if differs else t[:, 0]
    fraction: Tensor = is_masked.unflatten(1, (t.shape[1], -1)).float().mean(2)
    return fraction
