"""Rows that share passes, what a mode does with them, and how their texts are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from twotower.diffusion import Sampler, SamplerKind
from twotower.engine.choosing import ChoosingBackend
from twotower.engine.denoiser import Denoiser
from twotower.engine.drafts import Drafting
from twotower.engine.events import Event, TokenLogprob, Verified
from twotower.engine.lookup_cache import LookupCache
from twotower.engine.row import Row
from twotower.model import ContextCache, TwoTower
from twotower.model.ngrams import Ngrams
from twotower.model.rows import append_rows, keep_rows, select_rows
from twotower.model.state import ForwardOutput

_KINDS: dict[str, SamplerKind] = {kind: kind for kind in get_args(SamplerKind)}  # modes of the name


class Draft(NamedTuple):
    """What is proposed to a row: a block, or the newest token of its text and what follows it."""

    tokens: list[int]
    parents: Sequence[int] = ()  # the index of what each follows, where it may be another

    @property
    def has_branches(self) -> bool:
        """Whether any token follows another than the one before it."""
        return any(parent != index - 1 for index, parent in enumerate(self.parents))


class Chosen(NamedTuple):
    """What a cycle adds to the text of a row."""

    tokens: list[int]
    logprobs: Sequence[TokenLogprob] | None = None  # of each, if the row asked for them
    verified: Verified = Verified()  # a tuple


@dataclass(frozen=True)
class DecodingMode:
    """How a mode advances a batch by one unit: a block, a draft, a token.

    `draft` is the denoiser's work: it only reads the cache, and puts what it proposes into
    `batch.drafts`. `choose` is the context tower's: what of it is committed; the cache keeps what
    was read for that, or is as it was after an error. `start`: `choose` right behind the prompts.
    """

    choose: Callable[["Batch"], list[Chosen]]
    draft: Callable[["Batch"], Iterator[Event] | None] = lambda batch: None
    start: Callable[["Batch"], list[Chosen]] | None = None
    num_unread: int = 0  # newest tokens of a text that the cache does not hold


@dataclass(eq=False)
class Batch:
    """Rows that are equal in all that shapes a pass, and the cache of their texts."""

    model: TwoTower
    mode: DecodingMode
    rows: list[Row]
    cache: ContextCache
    ngrams: Sequence[Ngrams | LookupCache] = ()  # that lookups have beside a row's own text
    denoiser: Denoiser | None = None  # once it has filled a block
    drafts: Sequence[Draft] = ()  # of each row, once there are any
    chosen: Sequence[Chosen] = ()  # what the context tower made of them
    drafting: Drafting | None = field(default=None, init=False)  # of these rows, once they draft

    @cached_property
    def sampler(self) -> Sampler:
        """How the rows choose tokens."""
        options = [row.options for row in self.rows]
        first = options[0]
        steps = [o.draft_passes if o.mode == "speculative" else o.steps_per_block for o in options]
        return Sampler(
            temperature=torch.tensor([float(o.temperature) for o in options]),
            top_k=torch.tensor([o.top_k for o in options]),
            top_p=torch.tensor([float(o.top_p) for o in options]),
            min_p=torch.tensor([float(o.min_p) for o in options]),
            steps=torch.tensor(steps),
            threshold=torch.tensor([float(o.confidence_threshold) for o in options]),
            kind=_KINDS.get(first.mode, "confidence"),
            schedule=first.schedule,
            remask=first.remask,
            adaptive=first.adaptive,
            mask_token_id=self.model.config.mask_token_id,
            unused_ids=self.rows[0].unused_ids,  # all rows have one tokenizer
            has_min_p=any(o.min_p > 0 for o in options),
            has_ranks=any(o.top_k > 0 or o.top_p < 1 for o in options),
        )

    @cached_property
    def needs_host(self) -> bool:
        """Whether more than logits and noise chooses tokens of any row, or tells of them."""
        return any(row.needs_host for row in self.rows)

    @cached_property
    def is_plain(self) -> bool:
        """Whether every row takes the best token, and nothing more is asked of logits."""
        return self.sampler.is_greedy and not self.needs_host

    @cached_property
    def chooser(self) -> ChoosingBackend | None:
        """The model's backend, if it chooses tokens and no more than logits and noise is needed."""
        backend = self.model.backend
        can_choose = backend.chooses_tokens and not self.needs_host
        return cast(ChoosingBackend, backend) if can_choose else None

    @property
    def is_prompt(self) -> bool:
        """Whether no row has begun to write, and the prompts are not read to their end."""
        return not any(row.tokens for row in self.rows) and not self.has_read

    @property
    def num_unread(self) -> int:
        """Newest tokens that the cache is not to hold; before a `start`, which needs all, none."""
        is_prompt = self.mode.start is not None and not self.rows[0].tokens
        return 0 if is_prompt else self.mode.num_unread

    @property
    def ends(self) -> list[int]:
        """How many tokens of each row the cache is to hold."""
        return [len(row.prompt) + len(row.tokens) - self.num_unread for row in self.rows]

    @property
    def has_read(self) -> bool:
        """Whether the cache holds all of these."""
        return self.ends == self.cache.lengths.tolist()

    def part(self, indices: Sequence[int]) -> "Batch":
        """The rows of some indices, in order; the batch itself when these are all."""
        if len(indices) == len(self.rows):
            return self
        rows = [self.rows[index] for index in indices]
        drafts = [self.drafts[index] for index in indices] if self.drafts else ()
        cache = select_rows(self.cache, torch.tensor(indices, dtype=torch.int64))
        return replace(self, rows=rows, cache=cache, drafts=drafts)

    def keep(self, indices: Sequence[int]) -> "Batch":
        """As `part`, in any order, with the batch's own cache, which loses the other rows."""
        if len(indices) == len(self.rows):
            return self
        return replace(self, rows=[self.rows[i] for i in keep_rows(self.cache, indices)])

    def join(self, other: "Batch") -> "Batch":
        """These rows and then the other's, with this batch's own cache."""
        append_rows(self.cache, other.cache)
        return replace(self, rows=self.rows + other.rows)

    def commit(self, output: ForwardOutput, counts: Tensor) -> None:
        """Keep the first counts (B,) of the tokens of a pass over all rows, in the cache."""
        self.cache.commit(output, counts)
        for row in self.rows:
            row.context_forwards += 1

    def read(self, most: int | None = None) -> None:
        """Let the context tower read on, up to the `ends`: at most `most` a row."""
        starts, ends = self.cache.lengths.tolist(), self.ends
        if starts == ends:
            return
        bounds = list(zip(self.rows, starts, ends, strict=True))
        pieces = [row.between(a, b if most is None else min(a + most, b)) for row, a, b in bounds]
        ids, counts = padded(pieces)
        self.model.extend(self.cache, ids, counts)
        for (row, start, end), count in zip(bounds, counts.tolist(), strict=True):
            row.context_forwards += start < start + count == end  # a prompt counts as one


def padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens of rows as (B, n) and how many each has (B,). Padding is any token: a mask of the
    denoiser's own is none that the context tower could read.
    """
    counts = [len(row) for row in rows]
    ids = torch.tensor([row + [0] * (max(counts) - len(row)) for row in rows])
    return ids, torch.tensor(counts)


@dataclass
class Group:
    """Rows that are in one tower at a time: a batch of each kind, and batches of prompts."""

    batches: list[Batch] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self.batches for row in batch.rows]

    def add(self, batch: Batch) -> None:
        """Let rows decode with those of their kind, or have their prompts read."""
        for own in [] if batch.is_prompt else self.batches:
            if not own.is_prompt and kind_of(own.rows[0]) == kind_of(batch.rows[0]):
                self.batches.remove(own)
                batch = own.join(batch)
                break
        self.batches.append(batch)

    def keep(self, stays: Callable[[Row], bool]) -> None:
        """Drop all other rows, and their parts of the caches."""
        found = [(b, [i for i, row in enumerate(b.rows) if stays(row)]) for b in self.batches]
        self.batches = [batch.keep(indices) for batch, indices in found if indices]

    def remove(self, row: Row) -> Batch:
        """A row with its part of the cache, which leave the group."""
        batch = next(batch for batch in self.batches if row in batch.rows)
        own = batch.part([batch.rows.index(row)])
        self.keep(lambda other: other is not row)
        return own


def kind_of(row: Row) -> object:
    """Equal for rows that can share passes: equal in all that shapes a pass."""
    o, is_kept = row.options, row.keeps_context
    if row.given:
        return "given", is_kept
    if o.mode in ("ar", "mock-ar"):
        return o.mode, is_kept
    is_verified = o.verify_threshold > 0 or o.logprobs is not None
    return o.mode, is_kept, o.block_size, o.schedule, o.remask, o.adaptive, is_verified
