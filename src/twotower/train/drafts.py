"""What a thin denoiser learns from rows: to draft a block from its first token and masks.

Context states are computed anew in every step, so its layers may read any state, a Mamba layer's
too. `twotower adapt` caches what a denoiser of attention layers reads, for backbones that are slow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from twotower.backends import accelerate, refusal, setup_of
from twotower.checkpoint.empty import build_empty
from twotower.diffusion.loss import masked_loss_sum
from twotower.model.training import read_as_decoding
from twotower.model.two_tower import TwoTower
from twotower.model.view import ContextView
from twotower.train.data import Batch
from twotower.train.objective import Inputs, Noise, choose_blocks
from twotower.train.options import TrainOptions
from twotower.train.parallel import whole
from twotower.train.processes import Processes

# Rows (B, K*T), T, and N blocks of each (B, N) -> what a denoiser reads before them.
Reader = Callable[[Tensor, int, Tensor], ContextView]


def reader_of(model: TwoTower, options: TrainOptions, processes: Processes) -> Reader:
    """How what a thin denoiser reads is computed: by native passes, as decoding's, where they run
    the model, which every process then holds whole; else by PyTorch, in one pass over a row.
    ValueError (one line) for a backend or a quantisation that is not to be had.
    """
    frozen = model
    if options.backend != "eager" and not refusal("native", setup_of(model, options.quantization)):
        frozen = _context_alone(model)
    made = processes.together(lambda: accelerate(frozen, options.backend, options.quantization))
    if made.backend.name == "native":
        return partial(read_as_decoding, made, set(model.config.reads))
    return torch.compile(model.read_blocks) if options.compile else model.read_blocks


def _context_alone(model: TwoTower) -> TwoTower:
    """A model of the context tower and its head, of the same weights where they are in one piece.
    Every process must call it.
    """
    alone = build_empty(model.config, "context")
    names = alone.state_dict().keys()
    values = {n: whole(value) for n, value in model.state_dict().items() if n in names}
    alone.load_state_dict(values, assign=True)
    return alone


@dataclass(frozen=True, kw_only=True)
class CleanBlocks(Inputs):
    """Rows `context` (B, K*T) and N blocks of each to draft: `index` (B, N) says which; `clean`
    (B, N, T) are their tokens, `weight` (B, N, T - 1) what each but the first adds to the loss.
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

    def __init__(self, options: TrainOptions, block_size: int, read: Reader) -> None:
        self._options, self._block_size, self._read = options, block_size, read
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
            clean=tokens[rows, index],
            weight=weight,
            counts=weight.sum().unsqueeze(0),
        )

    def loss_sums(self, model: TwoTower, inputs: CleanBlocks) -> Tensor:
        """(1,): the cross-entropy of the drafted tokens, weighted."""
        view = self._read(inputs.context, self._block_size, inputs.index)
        return self._sum(model, view, inputs).unsqueeze(0)


def draft_sum(model: TwoTower, view: ContextView, blocks: CleanBlocks) -> Tensor:
    """The loss sum of `DraftedBlocks`."""
    starts, weight = blocks.index * blocks.clean.shape[2], blocks.weight.flatten(1)
    logits = model.draft_logits(view, blocks.clean, starts).flatten(1, 2)
    return masked_loss_sum(logits, blocks.clean[:, :, 1:].flatten(1), weight > 0, weight)
