"""The interface of backends that choose tokens where their passes run.

The host then synchronises once in several passes. `Backend` alone is enough to decode.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from twotower.diffusion import Sampler, Step
from twotower.model import ContextCache, ContextView


@runtime_checkable
class ChoosingBackend(Protocol):
    """A backend whose passes also choose tokens and commit them (`Backend.chooses_tokens`).

    ValueError (one line) where logits are not finite; caches are then what they were.
    """

    decode_steps: int
    """AR steps that it makes best before the host sees their tokens."""

    def decode(
        self,
        cache: ContextCache,
        drafts: Tensor,
        lengths: Tensor,
        sampler: Sampler,
        noise: Tensor | None,
        num_steps: int,
    ) -> tuple[Tensor, Tensor]:
        """Read drafts (B, n) of lengths (B,), choose a token after each, keep the drafts that the
        choices confirm; with n = 1 num_steps times, each choice the next draft.

        noise (B, n or steps, V): for `choose`; None when no row samples. Returns choices
        (B, n or steps) and how many of them stand (B,), on the CPU; the cache has read all before
        the last of these.
        """

    def fill(
        self,
        view: ContextView,
        blocks: Tensor,
        sampler: Sampler,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        """`denoise_block` with the model's denoiser, for a sampler of kind confidence."""
