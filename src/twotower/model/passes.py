"""The passes of decoding, checked: what an engine asks of a model, whatever backend runs them."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from twotower.arguments import require
from twotower.config import TwoTowerConfig
from twotower.kernels.quantised import Bits, Blocks, Quantised
from twotower.layers.adaln import TimestepEmbedder
from twotower.layers.bigram import Bigram
from twotower.model.backend import Backend, ContextInput, PassCosts
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.draft_tree import DraftTree
from twotower.model.state import ContextCache, ForwardOutput, empty_states
from twotower.model.view import ContextView
from twotower.specs import AttentionSpec, MambaSpec


class UnreadMatrix(Protocol):
    """A matrix, or a stack of them, that stays in a checkpoint's files until native passes take it.

    Unreadable (one line) where the files have changed, or hold what are no numbers.
    """

    @property
    def stored_bits(self) -> Bits | None:
        """`twotower.model.precision.stored_bits`."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor | Quantised | Blocks:
        """One of the stack, or the matrix, as the files have it."""
        ...

    def value(self, part: str) -> Tensor:
        """In full precision; of one with few bits, that part of `Quantised`."""
        ...


Unread = Mapping[str, UnreadMatrix]
"""By their names in the model, where they have no memory."""


class Unreadable(ValueError):
    """The files of a model have changed since it was loaded, or hold what are no numbers."""


class Passes(nn.Module):
    """The towers as decoding asks them; `TwoTower` makes them."""

    config: TwoTowerConfig
    context_tower: ContextTower
    context_lm_head: nn.Linear
    denoiser_tower: DenoiserTower | None
    lm_head: nn.Linear
    bigram: Bigram | None
    draft_ids: Tensor | None  # (draft_vocab_size,): the tokens of a smaller head of the denoiser
    t_embedder: TimestepEmbedder
    t_block: nn.Sequential
    scale_shift_tables: nn.ParameterList

    eager: ClassVar[Callable[..., Backend]]  # by the passes
    _backend: Backend | None = None  # None: eager
    unread: Unread

    @property
    def backend(self) -> Backend:
        """What runs the passes of decoding."""
        return self._backend or type(self).eager(self)

    @property
    def pass_costs(self) -> PassCosts:
        """What passes of decoding cost in AR steps."""
        return self.backend.pass_costs

    @property
    def has_denoiser(self) -> bool:
        """Whether blocks can be denoised."""
        return self.denoiser_tower is not None

    @property
    def context_device(self) -> torch.device:
        """Where the context tower lives."""
        return self.context_tower.norm_f.weight.device

    @property
    def denoiser_device(self) -> torch.device:
        """Where the denoiser tower lives; the context's device when there is none."""
        return (self.denoiser_tower or self.context_tower).norm_f.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What decoding's context tower computes in."""
        return self.backend.dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """What it keeps keys and values in."""
        return self.backend.kv_dtype

    @property
    def token_bytes(self) -> int:
        """Of the keys and values that the cache holds of a token."""
        kept = [spec for spec in self.config.context.layers if isinstance(spec, AttentionSpec)]
        return 2 * self.kv_dtype.itemsize * sum(spec.num_kv_heads * spec.head_dim for spec in kept)

    def empty_cache(
        self, num_rows: int, device: torch.device | None = None, keeps_outputs: bool = False
    ) -> ContextCache:
        """A cache before the first token. keeps_outputs: of the tower, at all tokens."""
        dtype, device = self.dtype, device or self.context_device
        layers = self.config.context.layers
        states = empty_states(layers, num_rows, device, dtype, self.kv_dtype)
        shape = num_rows, 0, self.config.hidden_size
        outputs = torch.empty(shape, dtype=dtype, device=device) if keeps_outputs else None
        return ContextCache(states, num_rows, outputs)

    def extend(self, cache: ContextCache, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Commit tokens (B, n >= 1) to the cache; counts (B,) in 0..n when rows commit fewer.

        Returns the tower's output (B, n, D); `context_head` makes logits of it.
        """
        whole = torch.full((cache.num_rows,), self.checked(tokens, "tokens", cache).shape[1])
        counts = whole if counts is None else counts.cpu()
        asked = None if counts.equal(whole) else counts
        output = self.backend.context_pass(cache, ContextInput(tokens, asked))
        cache.commit(output, counts)
        return output.hidden

    def verify(
        self,
        cache: ContextCache,
        tokens: Tensor,
        counts: Tensor | None = None,
        is_draft: bool = True,
        tree: DraftTree | None = None,
    ) -> ForwardOutput:
        """Forward pass over tokens (B, n >= 1) after the cache, which stays as it is:
        `cache.commit` keeps as many of them as are wanted.

        counts (B,): how many tokens of each row are worth a pass, all where not given; without
        is_draft just these will be committed, which saves work. tree: what each token follows,
        where drafts branch; ValueError (one line) where `verifies_trees` is false.
        Source: system.md section 4, 'Self-speculation'.
        """
        self.checked(tokens, "tokens", cache)
        if tree is not None and not self.verifies_trees:
            raise ValueError(
                "drafts branch, which the context tower's Mamba layers or the backend cannot "
                "verify; give drafts without branches"
            )
        return self.backend.context_pass(cache, ContextInput(tokens, counts, is_draft, tree))

    @property
    def verifies_trees(self) -> bool:
        """Whether drafts may branch: a Mamba layer's state is that of one text."""
        layers = self.config.context.layers
        has_mamba = any(isinstance(layer, MambaSpec) for layer in layers)
        return not has_mamba and self.backend.verifies_trees

    def context_head(self, hidden: Tensor) -> Tensor:
        """The context tower's logits: hidden (..., D) -> (..., V) float32."""
        return self.backend.context_head(hidden).float()

    def best_after(self, hidden: Tensor, unused_ids: Sequence[int]) -> Tensor | None:
        """As `Backend.best_after`; None where the backend has none."""
        best_after = self.backend.best_after
        return None if best_after is None else best_after(hidden, unused_ids)

    def next_logits(self, cache: ContextCache) -> Tensor:
        """Context-head logits after each row's last committed token: (B, V) float32."""
        if cache.last_hidden is None:
            raise ValueError("the cache is empty; prefill a prompt of at least one token first")
        return self.context_head(cache.last_hidden)

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """One denoiser pass: block (B, T) of ids with masks -> logits (B, T, V) float32, of the
        `draft_ids` where there are any.

        t (B,): masked fraction; None, or a thin denoiser, has no time conditioning. The view is
        only read.
        """
        self.denoiser()  # there is one
        t = None if self.config.draft is not None else t
        return self.backend.denoise(self.checked(block, "block"), view, t).float()

    def denoiser(self) -> DenoiserTower:
        """The denoiser tower; ValueError if there is none."""
        if self.denoiser_tower is None:
            raise ValueError(
                "this model has no denoiser tower; load it with towers='both', or use mode='ar'"
            )
        return self.denoiser_tower

    def checked(self, ids: Tensor, name: str, cache: ContextCache | None = None) -> Tensor:
        """The ids (B, L); ValueError (one line) for what are none, or do not fit a cache."""
        require(name, ids, Tensor, "an int64 tensor of token ids")
        if ids.dim() != 2 or ids.shape[1] < 1 or ids.dtype != torch.int64:
            raise ValueError(
                f"{name} has shape {tuple(ids.shape)} and dtype {ids.dtype}; "
                "must be (rows, tokens >= 1) int64"
            )
        if cache is not None and len(ids) != cache.num_rows:
            raise ValueError(f"{name} have {len(ids)} rows but the cache has {cache.num_rows}")
        return ids

    def require_read(self, purpose: str) -> None:
        """ValueError (one line) for a model that has left matrices in its files."""
        if self.unread:
            raise ValueError(
                f"{purpose} needs full-precision weights, and this model was loaded with a "
                "quantization, which rounds them as they are read; load it with quantization=none"
            )

    def require_loaded_weights(self, purpose: str) -> None:
        """ValueError (one line) if the backend has rounded them, or they are not in memory."""
        self.require_read(purpose)
        if self.backend.quantization != "none":
            raise ValueError(
                f"{purpose} uses the weights as loaded, and this model decodes with "
                f"quantization={self.backend.quantization}; use the model before accelerate"
            )
