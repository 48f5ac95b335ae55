"""A request and its row: from a prompt that is checked, in one line if unusable, to its last event.

A row waits in the queue, gets one of the engine's slots, has its prompt read, writes, and ends. It
may be paused in between, so that others get their turn.
"""

from __future__ import annotations

import math
import operator
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from twotower.arguments import require, shown
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
from twotower.engine.grammar_state import GrammarState, TokenRules, begin
from twotower.engine.options import (
    MODES_OF_BACKBONES,
    EngineOptions,
    GenerateOptions,
    ResolvedOptions,
    resolve_options,
)
from twotower.engine.text import RowText
from twotower.model import ContextCache, TwoTower
from twotower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from twotower.engine.batch import Batch
    from twotower.engine.drafts import DraftController, DrafterName, Proposal
    from twotower.engine.drafts_lookup import Lookup

Prompt = str | Sequence[int]


class Request(NamedTuple):
    """One prompt, text or token ids, and how to decode it.

    filters: what no reader may see of its text. caller: who asks; callers share the engine's slots
    evenly, and a caller's long rows make room for its short ones. Rows without one are served in
    the order in which they come. given: token ids that the text is to be, whatever the model would
    choose: the row tells their log-probabilities. keeps_context: `Finished` tells what the context
    tower has made of prompt and text.
    """

    prompt: Prompt
    options: GenerateOptions
    filters: tuple[Filter, ...] = ()
    caller: str | None = None
    given: tuple[int, ...] = ()
    keeps_context: bool = False


class Row:
    """The state of one prompt. Its randomness is its own: a row never depends on its neighbours."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        options: ResolvedOptions,
        text: RowText | None = None,
        grammar: GrammarState | None = None,
        caller: str | None = None,
        unused_ids: tuple[int, ...] = (),
        given: Sequence[int] = (),
        keeps_context: bool = False,
    ) -> None:
        self.unused_ids = unused_ids  # of the vocabulary, that no text has
        self.index, self.prompt, self.options = index, prompt, options
        self.text, self.grammar, self.caller, self.given = text, grammar, caller, given
        self.keeps_context = keeps_context
        self._generator: torch.Generator | None = None
        self.tokens: list[int] = []  # all, also those that filters hold back
        self.finish_reason: FinishReason | None = None
        self.nfe = self.context_forwards = 0
        self.cached_tokens = 0  # of the prompt, taken from the prefix cache
        self.num_commits = self.num_drafted = self.num_accepted = 0
        self.accepted_of: Counter[DrafterName] = Counter()
        # Of the engine: its client's wishes, and its share of the machine.
        self.is_cancelled = False
        self.deadline_s = math.inf  # of time.monotonic()
        self.submitted_s = time.monotonic()
        self.started_s: float | None = None  # when it first got a slot
        self.num_served = 0  # steps in which it had a slot
        self.num_since = 0  # steps since it got or lost its slot, or came
        self.paused: Batch | None = None  # all that was read, while it has no slot
        # Of speculation.
        self.controller: DraftController | None = None  # of the denoiser's drafts
        self.proposal: Proposal | None = None  # what this cycle's draft is, if it has one
        self.lookup: Lookup | None = None
        self.noise_ahead: list[Tensor] = []  # (V,) of each token to come, once drawn
        self._logprobs: list[TokenLogprob] = []
        self.num_released = 0  # tokens that were given out

    @property
    def generator(self) -> torch.Generator:
        """The row's randomness; made when first asked for, since most rows draw nothing."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.options.seed)
        return self._generator

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_filtered(self) -> bool:
        """Whether nobody may see what filters have not: there are no StepTaken events then."""
        return self.text is not None and self.text.is_filtered

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

    def save(self) -> tuple[int, Tensor | None, list[Tensor]]:
        """What a pass that fails may have changed, to try it again after `restore`."""
        state = None if self._generator is None else self._generator.get_state()
        return self.nfe, state, list(self.noise_ahead)

    def restore(self, saved: tuple[int, Tensor | None, list[Tensor]]) -> None:
        self.nfe, state, noise = saved
        self._generator = None  # its first state is that of its seed
        if state is not None:
            self.generator.set_state(state)
        self.noise_ahead = list(noise)

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
        text = "" if self.text is None else self.text.show()
        released = self._release()
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
        if self.text is not None:
            self.text.push(token)
        if token in self.options.eos_token_id:
            self.finish_reason = "eos"
        elif self.num_left == 0:
            self.finish_reason = "length"
        if self.text is not None:
            if self.is_finished:
                self.text.close()
            self.finish_reason = self.text.ending or self.finish_reason

    def _release(self) -> slice:
        """The tokens that may be given out now, from the first that was not."""
        end = len(self.tokens)
        if self.text is not None and self.is_filtered:
            end = self.text.num_released
        released, self.num_released = slice(self.num_released, end), end
        return released

    def _logprobs_of(self, tokens: slice) -> tuple[TokenLogprob, ...] | None:
        return None if self.options.logprobs is None else tuple(self._logprobs[tokens])

    def finished(self, context: ContextCache | None = None) -> Finished:
        """The row's last event."""
        assert self.finish_reason is not None
        released = slice(0, self.num_released)
        completion = Completion(
            tokens=self.tokens[released],
            text=None if self.text is None else self.text.text,
            nfe=self.nfe,
            context_forwards=self.context_forwards,
            finish_reason=self.finish_reason,
            logprobs=self._logprobs_of(released),
            lookup_tokens=self.accepted_of["lookup"],
            denoiser_tokens=self.accepted_of["denoiser"],
            cached_tokens=self.cached_tokens,
        )
        return Finished(row=self.index, completion=completion, context=context)


def make_row(
    model: TwoTower, index: int, request: Request, tokenizer: Tokenizer | None, name: str
) -> Row:
    """The row of a request; ValueError (one line, which calls the prompt `name`) if unusable."""
    if not isinstance(request.options, GenerateOptions):
        raise ValueError(f"options of {name} must be GenerateOptions, not {request.options!r}")
    options = resolve_options(request.options, defaults_of(model))
    longest = max(model.config.block_size, options.max_new_tokens)
    if options.block_size > longest:  # no longer than what may be written at all
        options = replace(options, block_size=longest)
    _check(model, options, tokenizer, request.filters)
    prompt = _prompt_ids(model, name, request.prompt, tokenizer)
    kept = request.keeps_context
    if request.given:
        options = replace(options, max_new_tokens=len(request.given))
        given = _prompt_ids(model, name, request.given, tokenizer)
        return Row(index, prompt, options, caller=request.caller, given=given, keeps_context=kept)
    text = None if tokenizer is None else RowText(tokenizer, options.stop, request.filters)
    grammar = None
    if options.grammar is not None:
        assert tokenizer is not None  # checked
        ids = model.config.mask_token_id, model.config.vocab_size
        grammar = begin(options.grammar, tokenizer, TokenRules(options.eos_token_id, *ids))
    unused = (
        model.unused_ids if tokenizer is None else tokenizer.unused_ids(model.config.vocab_size)
    )
    return Row(index, prompt, options, text, grammar, request.caller, unused, keeps_context=kept)


def defaults_of(model: TwoTower) -> dict[str, object]:
    """What a model's checkpoint prefers, for `resolve_options`."""
    config = model.config
    own = {"block_size": config.block_size, "eos_token_id": config.eos_token_ids or None}
    preferred = {**own, **model.generation_defaults}
    if not model.has_denoiser:
        is_ar = preferred.get("mode") == "ar"
        preferred |= {"mode": "ar" if is_ar else "speculative", "drafts": "lookup"}
    return preferred


def checked_engine(
    model: TwoTower, tokenizer: Tokenizer | None, engine: EngineOptions | None
) -> EngineOptions:
    """The engine's options; ValueError (one line) for arguments of wrong types, and for a tokenizer
    of a larger vocabulary than the model's.
    """
    if not hasattr(model, "context_tower"):
        raise ValueError(
            f"model={shown(model)} is not a loaded model; pass twotower.load_model(path)"
        )
    require("tokenizer", tokenizer, (Tokenizer, type(None)), "load_tokenizer(path)")
    require("engine", engine, (EngineOptions, type(None)), "EngineOptions(...)")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; load the tokenizer of the same checkpoint"
        )
    return engine or EngineOptions()


def require_denoiser(has_denoiser: bool, options: ResolvedOptions) -> None:
    """ValueError for a mode, or drafts, that need a tower which the model does not have."""
    is_speculative = options.mode == "speculative"
    is_drafted = is_speculative and options.drafts == "denoiser"
    if not has_denoiser and (is_drafted or options.mode not in MODES_OF_BACKBONES):
        asked = f"drafts={options.drafts!r}" if is_speculative else f"mode={options.mode!r}"
        raise ValueError(
            f"{asked} needs a denoiser tower, and this model has none; use mode='ar', or "
            "mode='speculative' with drafts='lookup'"
        )


def _check(
    model: TwoTower,
    options: ResolvedOptions,
    tokenizer: Tokenizer | None,
    filters: tuple[Filter, ...],
) -> None:
    """ValueError for what this model, or a row without a tokenizer, cannot do."""
    require_denoiser(model.has_denoiser, options)
    needs = {"stop": options.stop, "filters": filters, "grammar": options.grammar}
    for name, value in needs.items():
        if value and tokenizer is None:
            raise ValueError(f"{name} needs a tokenizer; pass tokenizer=load_tokenizer(path)")
    if options.grammar is not None and not options.eos_token_id:
        raise ValueError("grammar needs a token that ends the text; leave out ignore_eos")
    tokens = [("eos_token_id", token) for token in options.eos_token_id]
    for name, token in [*tokens, *(("logit_bias", token) for token, _ in options.logit_bias)]:
        if token >= model.config.vocab_size:
            raise ValueError(
                f"{name}={token} is outside the vocabulary; use 0 to {model.config.vocab_size - 1}"
            )


def known_ids(model: TwoTower, name: str, tokens: Sequence[int]) -> list[int]:
    """Token ids of the vocabulary, at least one; ValueError for anything else."""
    try:
        ids = [operator.index(token) for token in tokens]  # int() would take 5.7 and "5"
    except TypeError:
        raise ValueError(f"{name} must be text or a list of whole token ids") from None
    if not ids:
        raise ValueError(f"{name} is empty; give at least one token")
    vocab_size = model.config.vocab_size
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(
            f"{name} has token {bad[0]} outside the vocabulary; use 0 to {vocab_size - 1}"
        )
    return ids


def _prompt_ids(
    model: TwoTower, name: str, prompt: Prompt, tokenizer: Tokenizer | None
) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"{name} is text, and there is no tokenizer; pass tokenizer=load_tokenizer(path), "
                "or token ids"
            )
        if not prompt:
            raise ValueError(f"{name} is empty; give at least one character")
        return tokenizer.encode_prompt(prompt)
    ids, mask_token_id = known_ids(model, name, prompt), model.config.mask_token_id
    if mask_token_id in ids:
        raise ValueError(
            f"{name} has the mask token {mask_token_id}; a prompt is committed text, remove it"
        )
    return ids
