"""What runs the passes of decoding: the interface of `eager`, native and graphs.

A backend runs every pass that it is asked for: what it cannot run it refused when it was built
(`twotower.backends`). What is trained has no backend: it is always plain PyTorch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from twotower.model.draft_tree import DraftTree
from twotower.model.state import ContextCache, ForwardOutput
from twotower.model.view import ContextView


class PassCosts(NamedTuple):
    """AR steps of one row that passes cost, heads included (benchmarks/pass_costs.py)."""

    tokens: Mapping[int, float]
    """Of a pass over up to so many tokens, in ascending order; more than the last are as many such
    passes as they fill, and another one over the rest."""
    row: float = 0.1
    """Of each further row: it attends to a text of its own."""
    step_s: float | None = None
    """Seconds of an AR step of one row, where they were measured."""
    is_padded: bool = True
    """Whether a pass reads as many tokens of each row as of the longest one."""
    denoiser: float | None = None
    """Of a denoiser's pass, as a share of the context tower's over as many tokens, where that was
    measured."""


class ContextInput(NamedTuple):
    """What the context tower is to run over, after a cache.

    counts (B,): how many tokens of each row are worth a pass, None for all. is_draft: how many of
    them stay is decided after the pass; otherwise the counts are. tree: what each token follows,
    where that is not always the one before it.
    """

    tokens: Tensor  # (B, L >= 1)
    counts: Tensor | None = None
    is_draft: bool = False
    tree: DraftTree | None = None


class Backend(Protocol):
    """The passes of one model, without gradient; tokens and blocks are checked before."""

    name: str
    quantization: str
    """To what the loaded weights were rounded for these passes; none: they are as loaded."""
    dtype: torch.dtype
    """What the context tower's passes compute in."""
    kv_dtype: torch.dtype
    """What they leave keys and values in, rounded once, where they are made."""
    prefix_chunk: int
    """Tokens that are read at a time where contexts are kept for prompts that begin alike: fewer
    find longer common beginnings and cost more passes."""

    verifies_trees: bool
    """Whether drafts may branch, where the context tower has attention and no other state."""
    chooses_tokens: bool
    """Whether passes may choose tokens, too: then it is a `ChoosingBackend` of the engine."""

    @property
    def pass_costs(self) -> PassCosts:
        """What its passes cost, by which drafts are made as long as pays."""

    @property
    def rank(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """Its own `twotower.diffusion.most_probable`, if it has one."""

    @property
    def best_after(self) -> Callable[[Tensor, Sequence[int]], Tensor] | None:
        """The best token after each of the context tower's outputs (..., D), none of some ids:
        (...) int64, -1 where logits are not finite. None where logits are looked at instead.
        """

    def context_pass(self, cache: ContextCache, asked: ContextInput) -> ForwardOutput:
        """The context tower's pass after the cache, which stays as it is."""

    def context_head(self, hidden: Tensor) -> Tensor:
        """The context tower's logits: hidden (..., D) -> (..., V)."""

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """The denoiser tower over blocks (B, T >= 1) -> logits (B, T, V)."""
