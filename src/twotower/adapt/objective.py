"""The loss of a thin denoiser: blocks that begin anywhere in an answer, one clean token and masks.

The same blocks are what decoding asks for: the newest token, chosen but not yet read, and masks
behind it. Nearer tokens weigh more, because a token counts only if all before it are right.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.adapt.features import Rows
from twotower.layers.bigram import add_bigrams
from twotower.model import ContextView, TwoTower
from twotower.model.training import draft_blocks, first_and_masks
from twotower.model.view import LayerState

NO_TARGET = -100


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """N blocks of T tokens of each row: starts (B, N); clean (B, N, T), `NO_TARGET` where the text
    is over.
    """

    starts: Tensor
    clean: Tensor


def anchor_at(rows: Rows, starts: Tensor, block_size: int) -> Anchored:
    """The blocks of rows that begin at starts (B, N), each with a token before it."""
    at = starts.unsqueeze(2) + torch.arange(block_size, device=starts.device)
    is_text = at < rows.lengths[:, None, None]
    index = torch.arange(len(starts), device=starts.device)[:, None, None]
    clean = rows.tokens[index, at.clamp(max=rows.tokens.shape[1] - 1)]
    return Anchored(starts=starts, clean=clean.masked_fill(~is_text, NO_TARGET))


def random_starts(rows: Rows, uniform: Tensor) -> Tensor:
    """Where N blocks begin: any token of the answer but the last; uniform (B, N) in [0, 1)."""
    room = (rows.lengths - 1 - rows.starts).clamp(min=1).unsqueeze(1)
    return rows.starts.unsqueeze(1) + (uniform * room).long()


def draft_logits(model: TwoTower, rows: Rows, blocks: Anchored) -> Tensor:
    """The denoiser's logits (B, N, T - 1, V) of all tokens of the blocks but the first, without
    what the tokens before add to them.
    """
    num_rows, num_past = rows.tokens.shape
    layers: list[LayerState] = [rows.states.get(i) for i in range(model.config.context.num_layers)]
    index = torch.arange(num_rows, device=blocks.starts.device).unsqueeze(1)
    hidden = rows.hidden[index, blocks.starts - 1]
    view = ContextView(tuple(layers), None, num_past, num_rows, hidden)
    return draft_blocks(model, view, blocks.clean, blocks.starts)


def choose_drafts(model: TwoTower, logits: Tensor, blocks: Anchored) -> Tensor:
    """The most probable tokens (B, N, T - 1) as decoding chooses them: numbers of the draft
    vocabulary.
    """
    bigram, table, mask = model.bigram, model.denoiser().look_up, model.config.mask_token_id
    if bigram is None:
        return logits.argmax(-1)
    whole = F.pad(logits, (0, 0, 1, 0)).flatten(0, 1)  # as decoding has it, with the first token
    noisy = first_and_masks(blocks.clean, mask).flatten(0, 1)
    add_bigrams(whole, noisy, mask, model.draft_ids, lambda token: bigram(table(token)))
    return whole[:, 1:].argmax(-1).view(logits.shape[:3])


def targets_of(blocks: Anchored, draft_numbers: Tensor | None) -> Tensor:
    """What logits are scored on (B, N, T - 1): numbers in the draft vocabulary, `NO_TARGET` where
    there is no such token. draft_numbers (vocabulary,): each id's number, -1 for none.
    """
    wanted = blocks.clean[:, :, 1:]
    if draft_numbers is None:
        return wanted
    found = draft_numbers[wanted.clamp(min=0)]
    return torch.where((wanted < 0) | (found < 0), NO_TARGET, found)


@torch.no_grad()
def backbone_probabilities(model: TwoTower, rows: Rows, blocks: Anchored) -> Tensor:
    """The backbone's own probabilities (B, N, T - 1, V) of all tokens of the blocks but the first,
    among those that can be drafted.
    """
    at = blocks.starts.unsqueeze(2) + torch.arange(
        blocks.clean.shape[2] - 1, device=rows.hidden.device
    )
    index = torch.arange(len(at), device=at.device)[:, None, None]
    hidden = rows.hidden[index, at.clamp(max=rows.hidden.shape[1] - 1)]
    logits: Tensor = model.lm_head(hidden)
    return logits.float().softmax(-1)


def weighted_loss(
    logits: Tensor,
    targets: Tensor,
    decay: float,
    probabilities: Tensor | None = None,
    share: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The sum of cross-entropies, each token's with weight exp(-(k - 1) / decay) for the k-th of
    its block, and the sum of those weights. `share` of each is scored on the backbone's
    probabilities, the rest on the target alone.
    """
    weights = torch.exp(-torch.arange(targets.shape[-1], device=targets.device) / decay)
    weights = (weights.expand_as(targets) * (targets != NO_TARGET)).flatten()
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    if probabilities is not None and share > 0:
        mixed = probabilities.flatten(0, -2) * share
        chosen = wanted.clamp(min=0).unsqueeze(1)  # those that are none have no weight
        mixed.scatter_add_(1, chosen, mixed.new_full(chosen.shape, 1 - share))
        each = F.cross_entropy(flat, mixed, reduction="none")
    else:
        each = F.cross_entropy(flat, wanted, ignore_index=NO_TARGET, reduction="none")
    return (each * weights).sum(), weights.sum()
