"""What is asked of the engine, checked: a prompt and its options become a row, or one line says why
not.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

from twotower.engine.filters import Filter
from twotower.engine.grammar import Grammar, GrammarState, TokenRules, begin
from twotower.engine.options import GenerateOptions
from twotower.engine.pace import Pace
from twotower.engine.row import Row
from twotower.engine.row_text import RowText
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

Prompt = str | Sequence[int]


class Request(NamedTuple):
    """One prompt, text or token ids, how to decode it, and what no reader may see of it."""

    prompt: Prompt
    options: GenerateOptions
    filters: tuple[Filter, ...] = ()


def make_row(
    model: TwoTower, index: int, request: Request, tokenizer: Tokenizer | None, name: str
) -> Row:
    """The row of a request; ValueError (one line, which calls the prompt `name`) if unusable."""
    defaults = {"block_size": model.config.block_size, **model.generation_defaults}
    options = request.options.with_defaults(defaults)
    _check_options(model, options, tokenizer)
    ids = _prompt_ids(model, name, request.prompt, tokenizer)
    eos = _eos(model, options)
    text = _row_text(request, options, tokenizer)
    row = Row(index, ids, options, eos, text, Pace(model.draft_cost))
    if options.grammar is not None:
        row.grammar = _grammar(model, options.grammar, eos, tokenizer)
    return row


def _row_text(
    request: Request, options: GenerateOptions, tokenizer: Tokenizer | None
) -> RowText | None:
    if tokenizer is not None:
        return RowText(tokenizer, options.stop_strings, request.filters)
    for name, value in (("stop", options.stop_strings), ("filters", request.filters)):
        if value:
            raise ValueError(
                f"{name} needs a tokenizer to see text; pass tokenizer=load_tokenizer(path)"
            )
    return None


def _grammar(
    model: TwoTower, grammar: Grammar, eos: tuple[int, ...], tokenizer: Tokenizer | None
) -> GrammarState:
    if tokenizer is None:
        raise ValueError("grammar needs a tokenizer; pass tokenizer=load_tokenizer(path)")
    if not eos:
        raise ValueError("grammar needs a token that ends the text; leave out eos_token_id=None")
    rules = TokenRules(eos, model.config.mask_token_id, model.config.vocab_size)
    return begin(grammar, tokenizer, rules)


def check_tokenizer(model: TwoTower, tokenizer: Tokenizer | None) -> None:
    """ValueError when the tokenizer is of a larger vocabulary than the model's."""
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; load the tokenizer of the same checkpoint"
        )


def _check_options(model: TwoTower, options: GenerateOptions, tokenizer: Tokenizer | None) -> None:
    _check_mode(options)
    if options.mode != "ar" and not model.has_denoiser:
        raise ValueError(
            f"mode={options.mode!r} needs the denoiser tower; load both towers, or use mode='ar'"
        )


def _check_mode(options: GenerateOptions) -> None:
    """Refuse what the mode cannot do exactly."""
    mode = options.mode
    if options.grammar is not None and mode not in ("ar", "speculative"):
        reason = "commits tokens before all to their left are known"
        if mode == "mock-ar":
            reason = "takes what the denoiser says"
        raise ValueError(
            f"mode={mode!r} {reason}, so it can keep no grammar; use mode='speculative' or 'ar'"
        )
    if options.logprobs is not None and mode == "mock-ar":
        raise ValueError(
            "logprobs: they are the context tower's, which mode='mock-ar' does not ask for its "
            "choices; use another mode"
        )


def _eos(model: TwoTower, options: GenerateOptions) -> tuple[int, ...]:
    eos = options.eos_token_id
    if eos is None:
        return ()
    ids = model.config.eos_token_ids if eos == "config" else (eos,) if isinstance(eos, int) else eos
    for token in ids:
        if not (isinstance(token, int) and 0 <= token < model.config.vocab_size):
            raise ValueError(
                f"eos_token_id={token} is outside the vocabulary; "
                f"use 0 to {model.config.vocab_size - 1}"
            )
    return tuple(token for token in ids if isinstance(token, int))


def _prompt_ids(
    model: TwoTower, name: str, prompt: Prompt, tokenizer: Tokenizer | None
) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is text; pass tokenizer=load_tokenizer(path) with it")
        if not prompt:
            raise ValueError(f"{name} is empty; give at least one character")
        return tokenizer.encode(prompt, add_bos=tokenizer.bos_id is not None)
    try:
        ids = [operator.index(token) for token in prompt]  # int() would take 5.7 and "5"
    except TypeError:
        raise ValueError(f"{name} must be text or a list of whole token ids") from None
    if not ids:
        raise ValueError(f"{name} is empty; give at least one token")
    vocab_size, mask_token_id = model.config.vocab_size, model.config.mask_token_id
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(
            f"{name} has token {bad[0]} outside the vocabulary; use 0 to {vocab_size - 1}"
        )
    if mask_token_id in ids:
        raise ValueError(
            f"{name} has the mask token {mask_token_id}; a prompt is committed text, remove it"
        )
    return ids
