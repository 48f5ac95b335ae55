"""Both towers, their heads and the time conditioning, and what training calls.

Holds no generation loop, sampler, loss or checkpoint code.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from twotower import masks
from twotower.arguments import check, one_of, require
from twotower.config import TwoTowerConfig
from twotower.layers.adaln import TimestepEmbedder
from twotower.layers.bigram import Bigram
from twotower.model import training
from twotower.model.backend import Backend
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.eager import EagerBackend
from twotower.model.ngrams import Ngrams
from twotower.model.passes import Passes, Unread
from twotower.model.state import ContextCache

# Tokens of a prompt read at a time: bounds the attention scores at chunk x prompt.
PREFILL_CHUNK = 512
# What a thin denoiser may share, by the names of either tower's.
_SHARED = {"denoiser_tower.embeddings": "context_tower.embeddings", "lm_head": "context_lm_head"}


class TwoTower(Passes):
    """A frozen context tower that commits text and a denoiser tower that fills masked blocks.

    Parameter names are the released ones, but for the stacked experts. With towers="context" there
    is no denoiser (`denoiser_tower` is None): AR decoding and backbone training need no more.
    """

    prefix_chunk = EagerBackend.prefix_chunk
    eager = EagerBackend  # where no other runs them
    training_logits = training.training_logits  # methods
    joint_logits = training.joint_logits
    read_blocks = training.read_blocks
    draft_logits = training.draft_logits

    def __init__(self, config: TwoTowerConfig, towers: Literal["both", "context"] = "both") -> None:
        super().__init__()
        require("config", config, TwoTowerConfig, "the config of a loaded model")
        check({"towers": towers}, {"towers": one_of("both", "context")})
        self.config = config
        self.generation_defaults: Mapping[str, object] = {}  # what a checkpoint prefers
        self.unused_ids: tuple[int, ...] = ()  # of the vocabulary, that its tokenizer lacks
        self.unread: Unread = {}
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

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of the state, one after the other: read from the files where it has no memory
        here.
        """
        for name, tensor in self.state_dict().items():
            yield name, self._value(name, tensor)

    def values_of(self, part: str) -> dict[str, Tensor]:
        """The state of a module inside, as `values` has it."""
        state = self.get_submodule(part).state_dict()
        return {name: self._value(f"{part}.{name}", tensor) for name, tensor in state.items()}

    def _value(self, name: str, tensor: Tensor) -> Tensor:
        for own, other in _SHARED.items():
            is_of_own = name.startswith(f"{own}.")
            if is_of_own and self.get_submodule(own) is self.get_submodule(other):
                name = other + name.removeprefix(own)
        matrix, _, part = name.rpartition(".")
        if (found := self.unread.get(name)) is not None:
            return found.value("")
        if (found := self.unread.get(matrix)) is not None:  # of one with few bits
            return found.value(part)
        return tensor

    def with_backend(self, backend: Backend) -> "TwoTower":
        """This model's modules, with decoding passes by another backend."""
        found = copy.copy(self)
        found._backend = backend
        found.prefix_chunk = backend.prefix_chunk
        return found

    def context_logits(self, ids: Tensor) -> Tensor:
        """Next-token logits of the context tower: ids (B, L) int64 -> (B, L, V) float32, causal."""
        self.require_loaded_weights("context_logits")
        ids = self.checked(ids, "ids").to(self.context_device)
        length = ids.shape[1]
        hidden, _ = self.context_tower(ids, None, masks.causal(length, 0, ids.device), None, length)
        logits: Tensor = self.context_lm_head(hidden).float()
        return logits

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
