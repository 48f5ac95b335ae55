"""Both towers over whole texts, which training and scoring need and decoding does not.

Source: system.md section 5.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower import masks
from twotower.layers.mamba2 import MambaState
from twotower.model.eager import modulations
from twotower.model.passes import Passes
from twotower.model.view import ContextView, map_states


def training_logits(
    model: Passes,
    clean: Tensor,
    noisy: Tensor,
    t: Tensor | None,
    block_size: int,
    index: Tensor | None = None,
) -> Tensor:
    """Denoiser logits of N blocks per row at once: clean (B, K*T), noisy (B, N*T) of ids.

    index (B, N) says which block each noisy one is, with repeats; None: all K in order. t (B,) per
    row, (B, N) per block, or None. Returns (B, N*T, V) float32. Gradients reach the context tower
    only where its parameters require them. Source: system.md section 5.
    """
    return _read_and_denoise(model, clean, noisy, t, block_size, index)[0]


def joint_logits(
    model: Passes,
    clean: Tensor,
    noisy: Tensor,
    t: Tensor | None,
    block_size: int,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`training_logits` and, of the same pass over clean, `context_logits` (B, K*T, V)."""
    logits, hidden = _read_and_denoise(model, clean, noisy, t, block_size, index)
    return logits, model.context_lm_head(hidden).float()


def _read_and_denoise(
    model: Passes,
    clean: Tensor,
    noisy: Tensor,
    t: Tensor | None,
    block_size: int,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Denoiser logits (B, N*T, V), and what the context tower made of clean (B, K*T, D)."""
    model.require_loaded_weights("training")
    if model.config.draft is not None:
        raise ValueError(
            "this denoiser is a thin one, which only drafts and scores no texts; use the context "
            "tower, or a full denoiser"
        )
    num_rows, length = model.checked(clean, "clean").shape
    if length % block_size:
        raise ValueError(
            f"clean {tuple(clean.shape)} must be a multiple of block_size={block_size} long"
        )
    if index is None:
        every = torch.arange(length // block_size, device=clean.device)
        index = every.expand(num_rows, -1)
    if noisy.shape != (num_rows, index.shape[1] * block_size):
        raise ValueError(
            f"noisy has shape {tuple(noisy.shape)}; {tuple(index.shape)} blocks of "
            f"block_size={block_size} of clean {tuple(clean.shape)} need "
            f"{(num_rows, index.shape[1] * block_size)}"
        )
    context, view = _training_view(model, clean, block_size, index)
    device = model.denoiser_device
    view, blocks = view.to(device), noisy.unflatten(1, (-1, block_size)).to(device)
    if t is not None:
        t = (t if t.dim() == 2 else t.unsqueeze(-1)).to(device)
    times = None if t is None else modulations(model, t)
    start = index.to(device) * block_size
    mask = masks.block_causal(start, length, block_size)
    hidden = model.denoiser()(blocks, view, mask, times, start)
    logits: Tensor = model.lm_head(hidden.flatten(1, 2)).float()
    return logits, context


def read_blocks(model: Passes, clean: Tensor, block_size: int, index: Tensor) -> ContextView:
    """What a denoiser reads of rows before N blocks of each, of one pass; clean, index as in
    `training_logits`.
    """
    model.require_loaded_weights("training")
    rows = torch.arange(len(model.checked(clean, "clean")), device=clean.device).unsqueeze(1)
    context, view = _training_view(model, clean, block_size, index)
    before = _shift_one_block(context[:, block_size - 1 :: block_size])[rows, index]
    return replace(view, hidden=before)


@torch.no_grad()
def read_as_decoding(
    model: Passes, reads: Collection[int], clean: Tensor, block_size: int, index: Tensor
) -> ContextView:
    """What layers `reads` and the last norm make of rows by passes of decoding, those of the
    model's backend. Arguments and result as of `read_blocks`, but for the keys of the last block,
    which no block reads.
    """
    cache = model.empty_cache(len(clean))
    views = [cache.view(reads)]  # before each block
    for block in clean.split(block_size, dim=1)[:-1]:
        model.extend(cache, block)
        views.append(cache.view(reads))
    rows, last = torch.arange(len(clean)).unsqueeze(1), views[-1]
    none = torch.zeros(len(clean), 1, model.config.hidden_size)
    hidden = torch.cat([none if view.hidden is None else view.hidden for view in views], dim=1)
    layers = list(last.layers)
    for i, state in enumerate(layers):
        if isinstance(state, MambaState):
            before = zip(*(view.layers[i] or () for view in views), strict=True)
            layers[i] = MambaState(*(torch.cat(parts, dim=1)[rows, index] for parts in before))
    return replace(last, layers=tuple(layers), hidden=hidden[rows, index], version=None)


def draft_logits(model: Passes, view: ContextView, clean: Tensor, starts: Tensor) -> Tensor:
    """A thin denoiser's logits of blocks clean (B, N, T), as it drafts them: each of the first
    token and masks; the bigram term is given the true token before. view: as `read_blocks` gives
    it; starts (B, N): of each block in its row. Returns those of all tokens but the first,
    (B, N, T - 1, V) float32.
    """
    logits = draft_blocks(model, view, clean, starts).float()
    return add_true_bigrams(model, logits, clean)


def draft_blocks(model: Passes, view: ContextView, clean: Tensor, starts: Tensor) -> Tensor:
    """A thin denoiser's logits (B, N, T - 1, V) of all tokens of blocks clean (B, N, T) but the
    first, without bigrams. view: with `hidden` before each; starts (B, N): of each in its row.
    """
    mask = masks.block_causal(starts, view.num_past, clean.shape[2])
    noisy = first_and_masks(clean, model.config.mask_token_id)
    hidden = model.denoiser()(noisy, view, mask, None, starts)[:, :, 1:]
    # Contiguous: of a slice, PyTorch makes one small product a block.
    logits: Tensor = model.lm_head(hidden.contiguous())
    return logits


def first_and_masks(clean: Tensor, mask_token_id: int) -> Tensor:
    """Blocks (..., T) as they are drafted: the first token, and masks."""
    return F.pad(clean[..., :1], (0, clean.shape[-1] - 1), value=mask_token_id)


def add_true_bigrams(model: Passes, logits: Tensor, clean: Tensor) -> Tensor:
    """Logits (B, N, T - 1, V) with what the true token before, of clean (B, N, T), adds to each;
    one below 0 is none.
    """
    if model.bigram is None:
        return logits
    before = model.denoiser().look_up(clean[..., :-1].clamp(min=0))
    added: Tensor = model.bigram(before.detach())
    return logits + added


def _training_view(
    model: Passes, clean: Tensor, block_size: int, index: Tensor
) -> tuple[Tensor, ContextView]:
    """One causal pass over clean (B, K*T): its output (B, K*T, D), all keys, and Mamba states
    before blocks (B, N).
    """
    num_rows, length = clean.shape
    frozen = not any(p.requires_grad for p in model.context_tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        mask = masks.causal(length, 0, clean.device)
        context, states = model.context_tower(clean, None, mask, None, block_size)
    rows = torch.arange(num_rows, device=clean.device).unsqueeze(1)
    layers = map_states(states, lambda part: _shift_one_block(part)[rows, index], MambaState)
    return context, ContextView(layers, None, length, num_rows)


def _shift_one_block(ends: Tensor) -> Tensor:
    """What was at the end of each block (B, K, ...) -> at its start: block 0 starts from zeros."""
    return F.pad(ends[:, :-1], (0, 0) * (ends.dim() - 2) + (1, 0))
