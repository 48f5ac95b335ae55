"""One prompt on its way through decoding: what it has written and when it ends."""

from __future__ import annotations

import torch

from twotower.engine.events import Completion, Finished, FinishReason, TokensCommitted
from twotower.engine.options import GenerateOptions
from twotower.engine.pace import Pace
from twotower.tokenizer import Tokenizer


class Row:
    """The state of one prompt. Its randomness is its own: a row never depends on its neighbours."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        options: GenerateOptions,
        eos: tuple[int, ...],
        tokenizer: Tokenizer | None,
        pace: Pace,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.options = options
        self.eos = eos
        self.generator = torch.Generator().manual_seed(options.seed)
        self.tokens: list[int] = []
        self.nfe = 0
        self.context_forwards = 0
        self.num_commits = 0
        self.finish_reason: FinishReason | None = None
        self.pace = pace  # of speculation
        self.noise_ahead: list[torch.Tensor] = []  # (V,) of each token to come, once drawn
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._text = ""  # all that is decoded
        self._shown = 0  # characters of it that were given out

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def commit(self, tokens: list[int]) -> TokensCommitted:
        """Take tokens one by one until the row ends; what follows the end is dropped."""
        taken = 0
        for token in tokens:
            self._take(token)
            taken += 1
            if self.is_finished:
                break
        self.num_commits += 1
        return TokensCommitted(
            row=self.index,
            block_index=self.num_commits - 1,
            tokens=tokens[:taken],
            text=self._show(),
            nfe=self.nfe,
            context_forwards=self.context_forwards,
        )

    def _take(self, token: int) -> None:
        self.tokens.append(token)
        if self._stream is not None:
            self._text += self._stream.push([token])
        if token in self.eos:
            self.finish_reason = "eos"
        elif len(self.tokens) == self.options.max_new_tokens:
            self.finish_reason = "length"
        if self.is_finished and self._stream is not None:
            self._text += self._stream.flush()
        self._cut_at_stop()

    def _cut_at_stop(self) -> None:
        """End the row where the first stop string begins; `_shown` text holds none."""
        found = [
            at
            for stop in self.options.stop_strings
            if (at := self._text.find(stop, self._shown)) >= 0
        ]
        if found:
            self._text = self._text[: min(found)]
            self.finish_reason = "stop"

    def _show(self) -> str:
        """Text that no later stop string can reach into."""
        held = 0 if self.is_finished else _longest_partial(self._text, self.options.stop_strings)
        end = len(self._text) - held
        text, self._shown = self._text[self._shown : end], max(end, self._shown)
        return text

    def finished(self) -> Finished:
        """The row's last event."""
        assert self.finish_reason is not None
        completion = Completion(
            tokens=list(self.tokens),
            text=None if self._tokenizer is None else self._text,
            nfe=self.nfe,
            context_forwards=self.context_forwards,
            finish_reason=self.finish_reason,
        )
        return Finished(row=self.index, completion=completion)


def _longest_partial(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is the start of a stop string."""
    for length in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
