"""The passes themselves, over an arena: what a GPU records.

They read and write fixed addresses, and ask the host for nothing.
"""

import torch
from torch import Tensor

from twotower import masks
from twotower.diffusion import Predictions, ban, commit_confident, most_probable
from twotower.graphs.arena import Arena
from twotower.graphs.choosing import Uses
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaInputs, MambaState, states_after
from twotower.model.eager import denoiser_logits
from twotower.model.two_tower import TwoTower
from twotower.model.view import ContextView, map_states


def read(
    model: TwoTower, arena: Arena, length: int, past: int, is_draft: bool
) -> tuple[Tensor, list[KV | MambaInputs | None]]:
    """The context tower over L tokens of every row, and what it leaves for the mirror."""
    mask = masks.causal_rows(length, arena.lengths, past)
    decided = (None, None) if is_draft else (arena.counts, length)
    hidden, states = model.context_tower(
        arena.ids("tokens", length), arena.layers(past), mask, *decided, arena.lengths
    )
    arena.keep(states, length)
    # States are large, and the mirror has them: a recording would keep them once more.
    return hidden, [None if isinstance(state, MambaState) else state for state in states]


def denoise(model: TwoTower, arena: Arena, length: int, past: int, has_time: bool) -> Tensor:
    """The denoiser tower over blocks of all rows."""
    layers = map_states(arena.layers(past), lambda part: part.unsqueeze(1), MambaState)
    view = ContextView(layers, None, past, arena.num_rows, arena.hidden.unsqueeze(1))
    mask = masks.full_rows(length, arena.lengths, past)
    t, start = arena.t if has_time else None, arena.lengths.unsqueeze(1)
    return denoiser_logits(model, arena.ids("blocks", length), view, mask, t, start)


def decode(
    model: TwoTower, arena: Arena, length: int, past: int, uses: Uses
) -> tuple[Tensor, Tensor]:
    """Drafts of L tokens are read, judged and kept as far as they stand, in place: the choices
    (B, L), -1 where logits are not finite, and how many of them stand (B,).
    """
    ids, rows = (
        arena.ids("tokens", length),
        torch.arange(arena.num_rows, device=arena.lengths.device),
    )
    mask = masks.causal_rows(length, arena.lengths, past)
    decided = (arena.counts, 1) if length == 1 else (None, None)
    hidden, states = model.context_tower(ids, arena.layers(past), mask, *decided, arena.lengths)
    logits = model.context_lm_head(hidden).float()
    choices = arena.choosing.choose(logits, uses)
    stay = count_accepted(ids, choices, arena.counts)
    inputs = [state for state in states if isinstance(state, MambaInputs)]
    after = iter(states_after(inputs, stay, length))
    kept = [
        MambaState(*(part.unsqueeze(1) for part in next(after)))
        if isinstance(state, MambaInputs)
        else state
        for state in states
    ]
    arena.keep(kept, length)
    last = (stay - 1).clamp(min=0)
    arena.hidden.copy_(hidden[rows, last])
    arena.lengths.add_(stay)
    ids[:, 0] = choices[rows, last]  # the next draft
    return choices.where(logits.isfinite().all(-1), -1), stay


def count_accepted(drafts: Tensor, choices: Tensor, lengths: Tensor) -> Tensor:
    """How many tokens of drafts (B, n) stand: the first, and each that the choice before it equals.

    choices (B, n): the AR tower's token after each; lengths (B,): how much of a row's draft counts.
    Returns (B,), none above its length.
    """
    if drafts.shape[1] == 1:  # nothing is drafted
        return lengths
    is_right = drafts[:, 1:] == choices[:, :-1]
    right = is_right.long().cumprod(1).sum(1) + 1
    return torch.minimum(right, lengths)


def fill(
    model: TwoTower, arena: Arena, length: int, past: int, uses: Uses, is_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A denoiser pass with its choices and commits, in place: its t (B,), and blocks and
    confidence (B, T) after it, NaN in a row whose logits are not finite.
    """
    choosing = arena.choosing
    block, confidence = arena.ids("blocks", length), arena.confidence(length)
    is_masked = block == model.config.mask_token_id
    arena.t.copy_(is_masked.float().mean(-1))
    logits = denoise(model, arena, length, past, model.config.draft is None).float()
    is_finite = logits.isfinite().flatten(1).all(-1, keepdim=True)
    logits = ban(logits, [model.config.mask_token_id])
    ids, probs = most_probable(logits, chosen=choosing.choose(logits, uses))
    tokens = ids.squeeze(-1) if model.draft_ids is None else model.draft_ids[ids.squeeze(-1)]
    found = Predictions(
        step=0, generators=(), is_masked=is_masked, logits=logits, tokens=tokens,
        confidence=probs.squeeze(-1), is_last=is_last,
    )  # fmt: skip
    commit = commit_confident(choosing.sampler(uses), found)
    sure = found.confidence.where(is_finite, float("nan"))
    confidence.copy_(sure.where(is_masked, confidence))
    block.copy_(found.tokens.where(commit, block))
    choosing.steps.sub_(1)
    return arena.t, block, confidence
