"""Interventions on a trained model, from outside: what a denoiser pass is given changes on its way.

Decoding takes these objects for a TwoTower; everything but `denoise` is the model's own, and the
library knows nothing of ablations.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model import ContextView, TwoTower

# What a pass reads: block (B, T) of ids, the view of the context, t (B,) or None.
Inputs = tuple[Tensor, ContextView, Tensor | None]
Change = Callable[[Tensor, ContextView, Tensor | None], Inputs]


class Intervened:
    """A model whose denoiser is given what `change` makes of its inputs."""

    def __init__(self, model: TwoTower, change: Change) -> None:
        self._model = model
        self._change = change

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """`TwoTower.denoise` of the changed inputs."""
        return self._model.denoise(*self._change(block, view, t))


def zero_seed(conv: bool = True, ssm: bool = True) -> Change:
    """The denoiser's Mamba layers start from zeros, as at the start of a text; keys stay."""

    def change(block: Tensor, view: ContextView, t: Tensor | None) -> Inputs:
        layers = tuple(
            MambaState(
                torch.zeros_like(state.conv) if conv else state.conv,
                torch.zeros_like(state.ssm) if ssm else state.ssm,
            )
            if isinstance(state, MambaState)
            else state
            for state in view.layers
        )
        return block, replace(view, layers=layers), t

    return change


def hide_keys(block: Tensor, view: ContextView, t: Tensor | None) -> Inputs:
    """Attention sees the block alone; the Mamba seeds stay."""
    layers = tuple(
        KV(state.k[:, :0], state.v[:, :0]) if isinstance(state, KV) else state
        for state in view.layers
    )
    return block, replace(view, layers=layers, lengths=None, num_past=0), t


def freeze_t(value: float | None) -> Change:
    """The time conditioning is told `value` in every pass; None switches it off."""

    def change(block: Tensor, view: ContextView, t: Tensor | None) -> Inputs:
        frozen = None if value is None else torch.full((len(block),), value, device=block.device)
        return block, view, frozen

    return change


class GuessesStay:
    """A model whose denoiser sees its last guess wherever a position would be masked again.

    What is committed, and when, is decided as before. One row at a time: a guess belongs to its
    block, and a pass does not say whose rows it has.
    """

    def __init__(self, model: TwoTower) -> None:
        self._model = model
        self._guess: Tensor | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """`TwoTower.denoise` of the block with guesses in the place of masks."""
        if len(block) != 1:
            raise ValueError(f"block: {len(block)} rows; guesses need batch size 1")
        mask_token_id = self._model.config.mask_token_id
        is_masked = block == mask_token_id
        if self._guess is None or bool(is_masked.all()):  # all masked: a new block
            shown = block
        else:
            shown = torch.where(is_masked, self._guess, block)
        logits = self._model.denoise(shown, view, t)
        banned = torch.tensor([mask_token_id], device=logits.device)
        self._guess = logits.index_fill(-1, banned, float("-inf")).argmax(-1)
        return logits
