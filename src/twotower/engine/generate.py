"""The public door to decoding: check prompts and options, then let the scheduler run."""

import warnings
from collections.abc import Iterable, Iterator, Sequence

from twotower.engine import queues
from twotower.engine.events import Completion, Event, Failed, Finished
from twotower.engine.options import EngineOptions, GenerateOptions
from twotower.engine.requests import Prompt, Request, check_tokenizer, make_row
from twotower.engine.row import Row
from twotower.engine.scheduler import WaitingLine
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
    per prompt; a field that is not named takes the checkpoint's default. engine: how
    many prompts at the same time, the others wait; a row's result does not depend on its
    neighbours. Raises ValueError (one line) for anything unusable.
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
    rows = _make_rows(model, prompts, _per_prompt(options, len(prompts)), tokenizer)
    return _run(model, rows, engine or EngineOptions())


def stream_requests(
    model: TwoTower,
    requests: Iterable[Request | None],
    tokenizer: Tokenizer | None = None,
    engine: EngineOptions | None = None,
) -> Iterator[Event]:
    """`stream` for any number of requests, read as places become free; rows are their numbers.

    None in place of a request means nothing at present: it is asked again after a cycle. A request
    that cannot be decoded yields Failed and does not end the others.
    """
    check_tokenizer(model, tokenizer)
    line = WaitingLine(_rows_or_failures(model, requests, tokenizer))
    return queues.run(model, line, engine or EngineOptions())


def _run(model: TwoTower, rows: list[Row], engine: EngineOptions) -> Iterator[Event]:
    for event in queues.run(model, WaitingLine(rows), engine):
        if isinstance(event, Failed):
            raise event.error or ValueError(event.message)
        yield event


def _rows_or_failures(
    model: TwoTower, requests: Iterable[Request | None], tokenizer: Tokenizer | None
) -> Iterator[Row | Failed | None]:
    index = 0
    for request in requests:
        if request is None:
            yield None
            continue
        try:
            row: Row | Failed = make_row(model, index, request, tokenizer, "the prompt")
        except ValueError as error:
            row = Failed(row=index, kind="invalid", message=str(error))
        yield row
        index += 1


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
    check_tokenizer(model, tokenizer)
    rows = [
        make_row(model, index, Request(prompt, option), tokenizer, f"prompt {index}")
        for index, (prompt, option) in enumerate(zip(prompts, options, strict=True))
    ]
    for size in sorted({row.options.block_size for row in rows if row.options.is_block_mode}):
        if size > model.config.block_size:
            warnings.warn(
                f"block_size={size} is larger than the {model.config.block_size} the model was "
                "trained with; expect the text to collapse",
                stacklevel=4,
            )
    return rows
