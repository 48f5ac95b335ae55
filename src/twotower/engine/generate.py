"""The public door to decoding: check prompts and options, group rows that share passes, run."""

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

from twotower.engine.block_loop import block_loop
from twotower.engine.events import Completion, Event, Finished
from twotower.engine.options import GenerateOptions
from twotower.engine.row import Row
from twotower.engine.speculate import speculative_loop
from twotower.engine.token_loop import ar_loop, mock_ar_loop
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Loop = Callable[[TwoTower, list[Row]], Iterator[Event]]


def generate(
    model: TwoTower,
    prompts: Sequence[Prompt],
    options: GenerateOptions | Sequence[GenerateOptions] | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """Decode prompts of any, different lengths >= 1; the results are in the prompts' order.

    prompts: lists of token ids, or strings when a tokenizer is given. options: one for all, or one
    per prompt; a field that is not named takes the checkpoint's default. A row's result does not
    depend on its neighbours. Raises ValueError (one line) for anything unusable.
    """
    finished = (e for e in stream(model, prompts, options, tokenizer) if isinstance(e, Finished))
    results = {event.row: event.completion for event in finished}
    return [results[row] for row in range(len(prompts))]


def stream(
    model: TwoTower,
    prompts: Sequence[Prompt],
    options: GenerateOptions | Sequence[GenerateOptions] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Event]:
    """`generate` as it happens: every step's block state, every commit, each row's end.

    Checks all arguments at once, before the first event is asked for.
    """
    rows = _make_rows(model, prompts, _per_prompt(options, len(prompts)), tokenizer)
    return _run(model, rows)


def _run(model: TwoTower, rows: list[Row]) -> Iterator[Event]:
    for loop, group in _groups(rows):
        yield from loop(model, group)


def _groups(rows: list[Row]) -> Iterable[tuple[Loop, list[Row]]]:
    """Rows that can share passes: equal in all that shapes a pass."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        o = row.options
        shape = (o.block_size, o.schedule, o.remask, o.adaptive) if o.is_block_mode else ()
        groups.setdefault((o.mode, shape), []).append(row)
    loops: dict[str, Loop] = {
        "ar": ar_loop,
        "mock-ar": mock_ar_loop,
        "speculative": speculative_loop,
    }
    return [(loops.get(group[0].options.mode, block_loop), group) for group in groups.values()]


def _per_prompt(
    options: GenerateOptions | Sequence[GenerateOptions] | None, num_prompts: int
) -> list[GenerateOptions]:
    if options is None or isinstance(options, GenerateOptions):
        return [options or GenerateOptions()] * num_prompts
    if len(options) != num_prompts:
        raise ValueError(
            f"options: {len(options)} given for {num_prompts} prompts; pass one, or one per prompt"
        )
    return list(options)


def _make_rows(
    model: TwoTower,
    prompts: Sequence[Prompt],
    options: list[GenerateOptions],
    tokenizer: Tokenizer | None,
) -> list[Row]:
    if isinstance(prompts, str):
        raise ValueError("prompts is a string; pass a list of prompts, e.g. [prompt]")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; load the tokenizer of the same checkpoint"
        )
    defaults = {"block_size": model.config.block_size, **model.generation_defaults}
    rows = []
    for index, (prompt, option) in enumerate(zip(prompts, options, strict=True)):
        option = option.with_defaults(defaults)
        _check_options(model, option, tokenizer)
        ids = _prompt_ids(model, index, prompt, tokenizer)
        rows.append(Row(index, ids, option, _eos(model, option), tokenizer))
    for size in sorted({row.options.block_size for row in rows if row.options.is_block_mode}):
        if size > model.config.block_size:
            warnings.warn(
                f"block_size={size} is larger than the {model.config.block_size} the model was "
                "trained with; expect the text to collapse",
                stacklevel=4,
            )
    return rows


def _check_options(model: TwoTower, options: GenerateOptions, tokenizer: Tokenizer | None) -> None:
    if options.stop_strings and tokenizer is None:
        raise ValueError("stop needs a tokenizer to see text; pass tokenizer=load_tokenizer(path)")
    if options.mode != "ar" and model.denoiser_tower is None:
        raise ValueError(
            f"mode={options.mode!r} needs the denoiser tower; load both towers, or use mode='ar'"
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
    model: TwoTower, index: int, prompt: Prompt, tokenizer: Tokenizer | None
) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"prompt {index} is text; pass tokenizer=load_tokenizer(path) with it")
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give at least one character")
        return tokenizer.encode(prompt, add_bos=tokenizer.bos_id is not None)
    try:
        ids = [operator.index(token) for token in prompt]  # int() would take 5.7 and "5"
    except TypeError:
        raise ValueError(f"prompt {index} must be text or a list of whole token ids") from None
    if not ids:
        raise ValueError(f"prompt {index} is empty; give at least one token")
    vocab_size, mask_token_id = model.config.vocab_size, model.config.mask_token_id
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(
            f"prompt {index} has token {bad[0]} outside the vocabulary; use 0 to {vocab_size - 1}"
        )
    if mask_token_id in ids:
        raise ValueError(
            f"prompt {index} has the mask token {mask_token_id}; "
            "a prompt is committed text, remove it"
        )
    return ids
