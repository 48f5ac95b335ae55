"""The row of a request: its text from the first token to its last event.

A row waits in the queue, gets one of the engine's slots, has its prompt read, writes, and ends. It
may be paused in between, so that others get their turn.
"""

import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from twotower.engine.drafts import DraftController, DrafterName, Proposal
from twotower.engine.drafts_lookup import Lookup
from twotower.engine.endings import Ending, Endings
from twotower.engine.events import (
    Completion,
    FailureKind,
    Finished,
    FinishReason,
    TokenLogprob,
    TokensCommitted,
    Verified,
)
from twotower.engine.filters import Filter
from twotower.engine.grammar_state import GrammarState
from twotower.engine.resolved import ResolvedOptions
from twotower.model import ContextCache
from twotower.tokenizer import Tokenizer


class RowText:
    """Takes tokens, gives out characters: whole ones, and none that an ending could reach into.
    Without a tokenizer there are none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        stops: tuple[str, ...] = (),
        filters: tuple[Filter, ...] = (),
    ) -> None:
        self.text = ""  # all that is decoded and not cut
        self.ending: Literal["stop", "content_filter"] | None = None
        self.is_filtered = bool(filters)  # nobody may see what they have not
        self.stream = None if tokenizer is None else tokenizer.stream()
        self._endings = Endings(stops, filters) if stops or filters else None
        self._num_shown = 0
        self._is_over = False
        self._ends: list[int] = []  # of each token: characters until its last is complete
        self._num_open = 0  # newest tokens, whose last character is not

    def push(self, token: int, is_last: bool) -> None:
        """Add a token, behind which none follows if it is the last; `ending` is set if a match ends
        the text. Raises FilterFailed.
        """
        if self.stream is None:
            return
        self._num_open += 1
        self._add(self.stream.push([token]))
        if is_last:
            self._add(self.stream.flush())
            self._ends += [len(self.text)] * self._num_open
            self._is_over = True
            if self._endings is not None and self.ending is None:
                self._end(self._endings.find_last(self.text))

    def show(self) -> str:
        """Characters that nothing can take back, from the first that was not shown yet."""
        end = len(self.text)
        if self._endings is not None and not self._is_over:
            end -= self._endings.num_held(self.text)
        start, self._num_shown = self._num_shown, max(end, self._num_shown)
        return self.text[start : self._num_shown]

    @property
    def num_released(self) -> int:
        """How many tokens consist of shown characters only."""
        return bisect_right(self._ends, self._num_shown)

    def _add(self, piece: str) -> None:
        if not piece:
            return
        self.text += piece
        self._ends += [len(self.text)] * self._num_open
        self._num_open = 0
        if self._endings is not None and self.ending is None:
            self._end(self._endings.find(self.text))

    def _end(self, ending: Ending | None) -> None:
        if ending is not None:
            self.text, self.ending, self._is_over = self.text[: ending.start], ending.reason, True


@dataclass(eq=False, repr=False)
class Row:
    """The state of one prompt. Its randomness is its own: its text never depends on other rows."""

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
    accepted_of: Counter[DrafterName] = field(default_factory=Counter)
    # Of the engine: its client's wishes, and its share of the machine.
    is_cancelled: bool = False
    deadline_s: float = math.inf  # of time.monotonic()
    submitted_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None  # when it first got a slot
    num_served: int = 0  # steps in which it had a slot
    num_since: int = 0  # steps since it got or lost its slot, or came
    # Of speculation.
    controller: DraftController | None = None  # of the denoiser's drafts
    proposal: Proposal | None = None  # what this cycle's draft is, if it has one
    lookup: Lookup | None = None
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
