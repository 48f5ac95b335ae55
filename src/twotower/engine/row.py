"""The row of a request: its text from the first token to its last event.

A row waits in the queue, gets one of the engine's slots, has its prompt read, writes, and ends. It
may be paused in between, so that others get their turn.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twotower.engine.events import (
    Completion,
    FailureKind,
    Finished,
    FinishReason,
    TokenLogprob,
    TokensCommitted,
    Verified,
)
from twotower.engine.grammar_state import GrammarState
from twotower.engine.resolved import ResolvedOptions
from twotower.engine.text import RowText
from twotower.model import ContextCache

if TYPE_CHECKING:
    from twotower.engine.batch import Batch
    from twotower.engine.drafts import DraftController, DrafterName, Proposal
    from twotower.engine.drafts_lookup import Lookup


@dataclass(eq=False, repr=False)
class Row:
    """The state of one prompt. Its randomness is its own: a row never depends on its neighbours."""

    index: int
    prompt: list[int]
    options: ResolvedOptions
    text: RowText = field(default_factory=RowText)
    grammar: GrammarState | None = None
    caller: str | None = None
    unused_ids: tuple[int, ...] = ()  # of the vocabulary, that no text has
    given: Sequence[int] = ()
    keeps_context: bool = False

    tokens: list[int] = field(default_factory=list)  # all, also those that filters hold back
    num_released: int = 0  # of these, given out
    finish_reason: FinishReason | None = None
    nfe: int = 0
    context_forwards: int = 0
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    num_commits: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_of: Counter["DrafterName"] = field(default_factory=Counter)
    # Of the engine: its client's wishes, and its share of the machine.
    is_cancelled: bool = False
    deadline_s: float = math.inf  # of time.monotonic()
    submitted_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None  # when it first got a slot
    num_served: int = 0  # steps in which it had a slot
    num_since: int = 0  # steps since it got or lost its slot, or came
    paused: "Batch | None" = None  # all that was read, while it has no slot
    # Of speculation.
    controller: "DraftController | None" = None  # of the denoiser's drafts
    proposal: "Proposal | None" = None  # what this cycle's draft is, if it has one
    lookup: "Lookup | None" = None
    noise_ahead: list[Tensor] = field(default_factory=list)  # (V,) of each token to come
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    @cached_property
    def generator(self) -> torch.Generator:
        """The row's randomness; most rows draw nothing."""
        return torch.Generator().manual_seed(self.options.seed)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @cached_property
    def needs_host(self) -> bool:
        """Whether more than its logits and its noise chooses its tokens, or tells of them."""
        options = self.options
        is_told = options.logprobs is not None or self.keeps_context
        return is_told or self.grammar is not None or options.has_penalties

    @property
    def num_left(self) -> int:
        """Tokens that the row may still write."""
        return self.options.max_new_tokens - len(self.tokens)

    def between(self, start: int, end: int) -> list[int]:
        """Tokens of prompt and text from `start` to `end`."""
        known = len(self.prompt)
        return self.prompt[start:end] + self.tokens[max(0, start - known) : max(0, end - known)]

    def abort_reason(self, now: float) -> FailureKind | None:
        """Why the row must not go on at the time now, in seconds of time.monotonic()."""
        if self.is_cancelled:
            return "cancelled"
        return "deadline" if now >= self.deadline_s else None

    def commit(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob] | None = None,
        verified: Verified = Verified(),  # noqa: B008  # a tuple
    ) -> TokensCommitted:
        """Take tokens one by one until the row ends; what follows the end is dropped.

        logprobs: of each token, if the row asked for them. Raises FilterFailed.
        """
        before = len(self.tokens)
        for token in tokens:
            self._take(token)
            if self.is_finished:
                break
        if logprobs is not None:
            self._logprobs += logprobs[: len(self.tokens) - before]
        del self.noise_ahead[: len(tokens)]  # spent
        self.num_commits += 1
        self.num_drafted += verified.drafted or 0
        self.num_accepted += verified.accepted or 0
        if verified.drafter is not None:
            self.accepted_of[verified.drafter] += verified.accepted or 0
        if self.grammar is not None and not self.is_finished:
            self.grammar.follow(self.tokens)  # which goes on beside the next pass
        if verified.rejected and self.is_finished:
            verified = verified._replace(rejected=0)  # only filler behind the end
        text, start = self.text.show(), self.num_released
        self.num_released = self.text.num_released if self.text.is_filtered else len(self.tokens)
        released = slice(start, self.num_released)
        return TokensCommitted(
            row=self.index,
            block_index=self.num_commits - 1,
            tokens=self.tokens[released],
            text=text,
            nfe=self.nfe,
            context_forwards=self.context_forwards,
            logprobs=self._logprobs_of(released),
            **verified._asdict(),
        )

    def _take(self, token: int) -> None:
        self.tokens.append(token)
        reason: FinishReason | None = "length" if self.num_left == 0 else None
        if token in self.options.eos_token_id:
            reason = "eos"
        self.text.push(token, is_last=reason is not None)
        self.finish_reason = self.text.ending or reason

    def _logprobs_of(self, tokens: slice) -> tuple[TokenLogprob, ...] | None:
        return None if self.options.logprobs is None else tuple(self._logprobs[tokens])

    def finished(self, context: ContextCache | None = None) -> Finished:
        """The row's last event."""
        assert self.finish_reason is not None
        released = slice(0, self.num_released)
        completion = Completion(
            tokens=self.tokens[released],
            text=None if self.text.stream is None else self.text.text,
            nfe=self.nfe,
            context_forwards=self.context_forwards,
            finish_reason=self.finish_reason,
            logprobs=self._logprobs_of(released),
            lookup_tokens=self.accepted_of["lookup"],
            denoiser_tokens=self.accepted_of["denoiser"],
            cached_tokens=self.cached_tokens,
        )
        return Finished(row=self.index, completion=completion, context=context)
