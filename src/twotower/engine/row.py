"""One prompt on its way through decoding: what it has written and when it ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twotower.engine.events import (
    Completion,
    Finished,
    FinishReason,
    TokenLogprob,
    TokensCommitted,
)
from twotower.engine.grammar import GrammarState
from twotower.engine.options import GenerateOptions
from twotower.engine.pace import Pace
from twotower.engine.row_text import RowText


class Row:
    """The state of one prompt. Its randomness is its own: a row never depends on its neighbours."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        options: GenerateOptions,
        eos: tuple[int, ...],
        text: RowText | None,
        pace: Pace,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.options = options
        self.eos = eos
        self.grammar: GrammarState | None = None
        self.generator = torch.Generator().manual_seed(options.seed)
        self.tokens: list[int] = []  # all, also those that filters hold back
        self.nfe = 0
        self.context_forwards = 0
        self.cached_tokens = 0  # of the prompt, taken from the prefix cache
        self.num_commits = 0
        self.finish_reason: FinishReason | None = None
        self.pace = pace  # of speculation
        self.noise_ahead: list[torch.Tensor] = []  # (V,) of each token to come, once drawn
        self.drafted: int | None = None  # tokens of the newest draft that were read
        self.accepted: int | None = None  # and those of them that stand
        self.given_back: int | None = None  # tokens of the newest block that a review refused
        self._text = text
        self._logprobs: list[TokenLogprob] = []
        self._num_released = 0  # tokens that were given out

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_filtered(self) -> bool:
        """Whether nobody may see what filters have not: block states are not told then."""
        return self._text is not None and self._text.is_filtered

    def commit(
        self, tokens: list[int], logprobs: Sequence[TokenLogprob] | None = None
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
        self.num_commits += 1
        text = "" if self._text is None else self._text.show()
        released = self._release()
        return TokensCommitted(
            row=self.index,
            block_index=self.num_commits - 1,
            tokens=self.tokens[released],
            text=text,
            nfe=self.nfe,
            context_forwards=self.context_forwards,
            logprobs=self._logprobs_of(released),
            drafted=self.drafted,
            accepted=self.accepted,
            given_back=self.given_back,
        )

    def _take(self, token: int) -> None:
        self.tokens.append(token)
        if self._text is not None:
            self._text.push(token)
        if token in self.eos:
            self.finish_reason = "eos"
        elif len(self.tokens) == self.options.max_new_tokens:
            self.finish_reason = "length"
        if self._text is not None:
            if self.is_finished:
                self._text.close()
            self.finish_reason = self._text.ending or self.finish_reason

    def _release(self) -> slice:
        """The tokens that may be given out now, from the first that was not."""
        end = len(self.tokens)
        if self._text is not None and self._text.is_filtered:
            end = self._text.num_released
        released, self._num_released = slice(self._num_released, end), end
        return released

    def _logprobs_of(self, tokens: slice) -> tuple[TokenLogprob, ...] | None:
        return None if self.options.logprobs is None else tuple(self._logprobs[tokens])

    def finished(self) -> Finished:
        """The row's last event."""
        assert self.finish_reason is not None
        given = slice(0, self._num_released)
        completion = Completion(
            tokens=self.tokens[given],
            text=None if self._text is None else self._text.text,
            nfe=self.nfe,
            context_forwards=self.context_forwards,
            finish_reason=self.finish_reason,
            logprobs=self._logprobs_of(given),
            cached_tokens=self.cached_tokens,
        )
        return Finished(row=self.index, completion=completion)
