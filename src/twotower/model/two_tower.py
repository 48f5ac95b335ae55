"""Both towers, their heads and the time conditioning: what decoding and training call.

Holds no generation loop, sampler, loss or checkpoint code.
"""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from twotower import masks
from twotower.arguments import check, one_of, require
from twotower.config import TwoTowerConfig
from twotower.layers.adaln import Modulation, TimestepEmbedder
from twotower.layers.bigram import Bigram
from twotower.model.backend import Backend, EagerBackend, PassCosts
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.draft_tree import DraftTree
from twotower.model.ngrams import Ngrams
from twotower.model.state import ContextCache, ForwardOutput, empty_states
from twotower.model.training import read_and_denoise, read_and_draft
from twotower.model.view import ContextView
from twotower.specs import AttentionSpec, MambaSpec

# Tokens of a prompt read at a time: bounds the attention scores at chunk x prompt.
PREFILL_CHUNK = 512


class TwoTower(nn.Module):
    """A frozen context tower that commits text and a denoiser tower that fills masked blocks.

    Parameter names are the released ones, but for the stacked experts. With towers="context" there
    is no denoiser (`denoiser_tower` is None): AR decoding and backbone training need no more.
    """

    prefix_chunk = EagerBackend.prefix_chunk
    draft_ids: Tensor | None  # (draft_vocab_size,): the tokens of a smaller head of the denoiser
    _backend: Backend | None = None  # None: eager

    def __init__(self, config: TwoTowerConfig, towers: Literal["both", "context"] = "both") -> None:
        super().__init__()
        require("config", config, TwoTowerConfig, "the config of a loaded model")
        check({"towers": towers}, {"towers": one_of("both", "context")})
        self.config = config
        self.generation_defaults: Mapping[str, object] = {}  # what a checkpoint prefers
        self.unused_ids: tuple[int, ...] = ()  # of the vocabulary, that its tokenizer lacks
        self.ngrams: Ngrams | None = None  # of what the model has written
        # Of drafts of a thin denoiser alone, on answers that it did not train on; None: not known.
        self.tokens_per_cycle: float | None = None
        width, vocab = config.hidden_size, config.vocab_size
        self.context_tower = ContextTower(config.context)
        self.context_lm_head = nn.Linear(width, vocab, bias=False)
        self.denoiser_tower: DenoiserTower | None = None
        self.bigram: Bigram | None = None
        if towers == "both":
            self.denoiser_tower = DenoiserTower(config)
            self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        draft = config.draft if towers == "both" else None
        is_smaller = draft is not None and draft.vocab_size is not None
        ids = torch.arange(config.draft_vocab_size) if is_smaller else None
        self.register_buffer("draft_ids", ids)
        if draft is not None:
            if draft.bigram_rank:
                self.bigram = Bigram(width, draft.bigram_rank, config.draft_vocab_size)
        elif towers == "both":
            self.t_embedder = TimestepEmbedder(width)
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
            self.scale_shift_tables = nn.ParameterList(
                torch.zeros(3, width) for _ in range(config.denoiser.num_layers)
            )
        self.tie_heads()

    def tie_heads(self) -> None:
        """Let the heads share the embeddings' weights where the configuration says so, and a thin
        denoiser the context tower's embeddings and, unless its own has fewer tokens, head.
        """
        if self.config.tie_word_embeddings:
            self.context_lm_head.weight = self.context_tower.embeddings.weight
            if self.denoiser_tower is not None and self.config.draft is None:
                self.lm_head.weight = self.denoiser_tower.embeddings.weight
        if self.denoiser_tower is not None and self.config.draft is not None:
            self.denoiser_tower.embeddings = self.context_tower.embeddings
            if self.config.draft.vocab_size is None:
                self.lm_head = self.context_lm_head

    @property
    def backend(self) -> Backend:
        """What runs the passes of decoding."""
        return self._backend or EagerBackend(self)

    def with_backend(self, backend: Backend) -> "TwoTower":
        """This model's modules, with decoding passes by another backend."""
        found = copy.copy(self)
        found._backend = backend
        found.prefix_chunk = backend.prefix_chunk
        return found

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
        return self.context_tower.embeddings.weight.device

    @property
    def denoiser_device(self) -> torch.device:
        """Where the denoiser tower lives; the context's device when there is none."""
        tower = self.context_tower if self.denoiser_tower is None else self.denoiser_tower
        return tower.embeddings.weight.device

    @property
    def token_bytes(self) -> int:
        """Of the keys and values that the cache holds of a token."""
        kept = (s for s in self.config.context.layers if isinstance(s, AttentionSpec))
        size = self.context_tower.embeddings.weight.element_size()
        return 2 * size * sum(spec.num_kv_heads * spec.head_dim for spec in kept)

    def context_logits(self, ids: Tensor) -> Tensor:
        """Next-token logits of the context tower: ids (B, L) int64 -> (B, L, V) float32, causal."""
        self.require_loaded_weights("context_logits")
        ids = self.checked(ids, "ids").to(self.context_device)
        length = ids.shape[1]
        hidden, _ = self.context_tower(ids, None, masks.causal(length, 0, ids.device), None, length)
        logits: Tensor = self.context_lm_head(hidden).float()
        return logits

    def empty_cache(
        self, num_rows: int, device: torch.device | None = None, keeps_outputs: bool = False
    ) -> ContextCache:
        """A cache before the first token. keeps_outputs: of the tower, at all tokens."""
        dtype, device = self.context_tower.embeddings.weight.dtype, device or self.context_device
        states = empty_states(self.config.context.layers, num_rows, device, dtype)
        shape = num_rows, 0, self.config.hidden_size
        outputs = torch.empty(shape, dtype=dtype, device=device) if keeps_outputs else None
        return ContextCache(states, num_rows, outputs)

    def prefill(
        self, ids: Tensor, lengths: Tensor | None = None, chunk_size: int | None = None
    ) -> ContextCache:
        """Read prompts ids (B, L), right-padded when `lengths` (B,) are given, chunk by chunk.

        chunk_size: tokens of a chunk, `PREFILL_CHUNK` where not given.
        """
        ids = self.checked(ids, "ids")
        if lengths is not None and not (
            int(lengths.min()) >= 0 and int(lengths.max()) <= ids.shape[1]
        ):
            raise ValueError(f"lengths={lengths.tolist()} must lie between 0 and {ids.shape[1]}")
        cache, start = self.empty_cache(len(ids)), 0
        while start < ids.shape[1]:
            chunk = ids[:, start : start + (chunk_size or PREFILL_CHUNK)]
            counts = None if lengths is None else (lengths.cpu() - start).clamp(0, chunk.shape[1])
            self.extend(cache, chunk, counts)
            start += chunk.shape[1]
        return cache

    def extend(self, cache: ContextCache, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Commit tokens (B, n >= 1) to the cache; counts (B,) in 0..n when rows commit fewer.

        Returns the tower's output (B, n, D); `context_head` makes logits of it.
        """
        tokens = self._after(cache, tokens)
        whole = [tokens.shape[1]] * len(tokens)
        counts = torch.tensor(whole) if counts is None else counts.cpu()
        asked = None if counts.tolist() == whole else counts
        output = self.backend.context_pass(cache, tokens, asked, is_draft=False)
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
        tokens = self._after(cache, tokens)
        if tree is not None and not self.verifies_trees:
            raise ValueError(
                "drafts branch, which the context tower's Mamba layers or the backend cannot "
                "verify; give drafts without branches"
            )
        return self.backend.context_pass(cache, tokens, counts, is_draft, tree)

    @property
    def verifies_trees(self) -> bool:
        """Whether drafts may branch: a Mamba layer's state is that of one text."""
        layers = self.config.context.layers
        has_mamba = any(isinstance(layer, MambaSpec) for layer in layers)
        return not has_mamba and self.backend.verifies_trees

    def context_head(self, hidden: Tensor) -> Tensor:
        """The context tower's logits: hidden (..., D) -> (..., V) float32."""
        return self.backend.context_head(hidden).float()

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
        t = None if self.config.draft is not None else t
        return self.backend.denoise(self.checked(block, "block"), view, t).float()

    def training_logits(
        self,
        clean: Tensor,
        noisy: Tensor,
        t: Tensor | None,
        block_size: int,
        index: Tensor | None = None,
    ) -> Tensor:
        """Denoiser logits of N blocks per row at once: clean (B, K*T), noisy (B, N*T) of ids.

        index (B, N) says which block each noisy one is, with repeats; None: all K in order.
        t (B,) per row, (B, N) per block, or None. Returns (B, N*T, V) float32. Gradients reach the
        context tower only where its parameters require them. Source: system.md section 5.
        """
        return read_and_denoise(self, clean, noisy, t, block_size, index)[0]

    def joint_logits(
        self,
        clean: Tensor,
        noisy: Tensor,
        t: Tensor | None,
        block_size: int,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`training_logits` and, of the same pass over clean, `context_logits` (B, K*T, V)."""
        logits, hidden = read_and_denoise(self, clean, noisy, t, block_size, index)
        return logits, self.context_lm_head(hidden).float()

    def draft_logits(self, clean: Tensor, block_size: int, index: Tensor) -> Tensor:
        """A thin denoiser's logits of N blocks per row, as it drafts them: each of the first token
        and masks; the bigram term is given the true token before. clean, index as in
        `training_logits`. Returns those of all tokens but the first, (B, N, T - 1, V) float32.
        """
        return read_and_draft(self, clean, block_size, index)

    def modulations(self, t: Tensor) -> list[Modulation]:
        """t (B, K) or (B, 1) -> for each layer shift, scale, gate (B, K, 1, D)."""
        m = self.t_block(self.t_embedder(t.to(self.denoiser_device)))
        m = m.unflatten(-1, (3, 1, -1))  # (B, K, 3, 1, D)
        tables = torch.stack(list(self.scale_shift_tables))  # (layers, 3, D)
        parts = (m + tables[:, None, None, :, None]).unbind(3)  # (layers, B, K, 1, D) each
        return [Modulation(*of_layer) for of_layer in zip(*map(torch.unbind, parts), strict=True)]

    def denoiser(self) -> DenoiserTower:
        """The denoiser tower; ValueError if there is none."""
        if self.denoiser_tower is None:
            raise ValueError(
                "this model has no denoiser tower; load it with towers='both', or use mode='ar'"
            )
        return self.denoiser_tower

    def require_loaded_weights(self, purpose: str) -> None:
        """ValueError (one line) if the backend has rounded them."""
        if self.backend.quantization != "none":
            raise ValueError(
                f"{purpose} uses the weights as loaded, and this model decodes with "
                f"quantization={self.backend.quantization}; use the model before accelerate"
            )

    def _after(self, cache: ContextCache, tokens: Tensor) -> Tensor:
        """Checked tokens that are to follow the cache."""
        if len(self.checked(tokens, "tokens")) != cache.num_rows:
            raise ValueError(f"tokens have {len(tokens)} rows but the cache has {cache.num_rows}")
        return tokens

    def checked(self, ids: Tensor, name: str) -> Tensor:
        """The ids (B, L); ValueError (one line) for what are none."""
        require(name, ids, Tensor, "an int64 tensor of token ids")
        if ids.dim() != 2 or ids.shape[1] < 1 or ids.dtype != torch.int64:
            raise ValueError(
                f"{name} has shape {tuple(ids.shape)} and dtype {ids.dtype}; "
                "must be (rows, tokens >= 1) int64"
            )
        return ids
