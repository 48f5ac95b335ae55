"""A request, and the row that is made of it: a prompt is checked, in one line if unusable."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from twotower.arguments import require, shown
from twotower.engine.filters import Filter
from twotower.engine.grammar_state import TokenRules, begin
from twotower.engine.options import EngineOptions, GenerateOptions
from twotower.engine.resolved import MODES_OF_BACKBONES, ResolvedOptions, resolve_options
from twotower.engine.row import Row, RowText
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

Prompt = str | Sequence[int]
_ENGINE = EngineOptions()  # where none is given
_NO_IDS = bytes, bytearray, set, frozenset, dict  # whose numbers are letters, or in no order


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
    row = Row(index, prompt, options, caller=request.caller, keeps_context=request.keeps_context)
    if request.given:
        row.given = _prompt_ids(model, name, request.given, tokenizer)
        row.options = replace(options, max_new_tokens=len(row.given))
        return row
    row.text = RowText(tokenizer, options.stop, request.filters)
    config, row.unused_ids = model.config, model.unused_ids
    if tokenizer is not None:
        row.unused_ids = tokenizer.unused_ids(config.vocab_size)
    if tokenizer is not None and options.grammar is not None:
        rules = TokenRules(options.eos_token_id, config.mask_token_id, config.vocab_size)
        row.grammar = begin(options.grammar, tokenizer, rules)
    return row


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
    """The engine's options; ValueError (one line) for arguments that are none, or do not fit."""
    if not hasattr(model, "context_tower"):
        raise ValueError(
            f"model={shown(model)} is not a loaded model; pass twotower.load_model(path)"
        )
    require("tokenizer", tokenizer, (Tokenizer, type(None)), "load_tokenizer(path)")
    require("engine", engine, (EngineOptions, type(None)), "EngineOptions(...)")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; load the tokenizer of the same checkpoint, or leave out "
            f"tokens that were added to it, by tokenizer.within({model.config.vocab_size})"
        )
    engine = engine or _ENGINE
    if not model.has_denoiser:
        refuse_overlap(engine, "on a model without a denoiser")
    return engine


def refuse_overlap(engine: EngineOptions, where: str) -> None:
    """ValueError for overlap=on where no row uses a denoiser."""
    if engine.overlap == "on":
        raise ValueError(f"overlap: has no effect in mode ar, or {where}; leave it out")


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
    most, biased = model.config.vocab_size - 1, [token for token, _ in options.logit_bias]
    for name, tokens in (("eos_token_id", options.eos_token_id), ("logit_bias", biased)):
        if beyond := [token for token in tokens if token > most]:
            raise ValueError(f"{name}={beyond[0]} is outside the vocabulary; use 0 to {most}")


def known_ids(model: TwoTower, name: str, tokens: Sequence[int]) -> list[int]:
    """Token ids of the vocabulary, at least one; ValueError for anything else."""
    try:
        if isinstance(tokens, _NO_IDS) or any(isinstance(token, bool) for token in tokens):
            raise TypeError
        ids = [operator.index(token) for token in tokens]  # int() would take 5.7 and "5"
    except TypeError:
        raise ValueError(f"{name} must be text or a list of whole token ids") from None
    if not ids:
        raise ValueError(f"{name} is empty; give at least one token")
    most = model.config.vocab_size - 1
    if bad := [token for token in ids if not 0 <= token <= most]:
        raise ValueError(f"{name} has token {bad[0]} outside the vocabulary; use 0 to {most}")
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
