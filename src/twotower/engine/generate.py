"""Decoding for a caller in the same thread: check all arguments, then let the scheduler run."""

import contextlib
import warnings
from collections.abc import Generator, Iterator, Sequence

from twotower.arguments import shown
from twotower.engine.events import Completion, Event, Failed, Finished
from twotower.engine.options import EngineOptions, GenerateOptions
from twotower.engine.request import Prompt, Request, checked_engine, make_row, refuse_overlap
from twotower.engine.request_queue import RequestQueue
from twotower.engine.resolved import BLOCK_MODES
from twotower.engine.row import Row
from twotower.engine.scheduler import Scheduler
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer


def generate(
    model: TwoTower,
    prompts: Sequence[Prompt],
    options: GenerateOptions | Sequence[GenerateOptions] | None = None,
    tokenizer: Tokenizer | None = None,
    engine: EngineOptions | None = None,
) -> list[Completion]:
    """Decode prompts of any, different lengths >= 1; the results are in the prompts' order.

    prompts: lists of token ids, or strings when a tokenizer is given. options: one for all, or one
    per prompt; a field that is not given takes the checkpoint's default. engine: how many prompts
    at the same time; no text depends on its neighbours. ValueError (one line) for what is unusable.
    """
    events = stream(model, prompts, options, tokenizer, engine)
    results = {event.row: event.completion for event in events if isinstance(event, Finished)}
    return [results[row] for row in range(len(prompts))]


def stream(
    model: TwoTower,
    prompts: Sequence[Prompt],
    options: GenerateOptions | Sequence[GenerateOptions] | None = None,
    tokenizer: Tokenizer | None = None,
    engine: EngineOptions | None = None,
) -> Iterator[Event]:
    """`generate` as it happens: every step's block state, every commit, each row's end.

    Checks all arguments at once, before the first event is asked for.
    """
    engine = checked_engine(model, tokenizer, engine)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts={shown(prompts)} must be a list of prompts, e.g. [prompt]")
    per_prompt = _per_prompt(options, len(prompts))
    rows = [
        make_row(model, index, Request(prompt, own), tokenizer, f"prompt {index}")
        for index, (prompt, own) in enumerate(zip(prompts, per_prompt, strict=True))
    ]
    if rows and not any(row.options.uses_denoiser for row in rows):
        refuse_overlap(engine, "with drafts=lookup")
    _warn_of_block_size(model, rows)
    return _or_raise(Scheduler(model, RequestQueue(rows), engine).run())


def _per_prompt(
    options: GenerateOptions | Sequence[GenerateOptions] | None, num_prompts: int
) -> Sequence[GenerateOptions]:
    if options is None or isinstance(options, GenerateOptions):
        return [options or GenerateOptions()] * num_prompts
    if not isinstance(options, Sequence) or isinstance(options, str):
        raise ValueError(f"options={shown(options)} must be GenerateOptions, or a list of them")
    if len(options) != num_prompts:
        counts = f"{len(options)} given for {num_prompts} prompts"
        raise ValueError(f"options: {counts}; pass one, or one per prompt")
    return options


def _warn_of_block_size(model: TwoTower, rows: Sequence[Row]) -> None:
    # A draft of any length changes no text.
    sizes = {row.options.block_size for row in rows if row.options.mode in BLOCK_MODES}
    for size in sorted(size for size in sizes if size > model.config.block_size):
        warnings.warn(
            f"blocks of {size} tokens are larger than the {model.config.block_size} the model was "
            "trained with; expect the text to collapse",
            stacklevel=4,
        )


def _or_raise(events: Generator[Event, None, None]) -> Iterator[Event]:
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Failed):
                raise event.error or ValueError(event.message)
            yield event
