"""`twotower generate`: complete prompts, in any mode, as text, JSON and a trace of every step."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import tyro

from twotower.cli.decoding import TextOptions, decoding_flags, refuse_without_denoiser
from twotower.cli.output_file import completion_record
from twotower.cli.progress import load_with_bar
from twotower.cli.prompts import Prompt, is_jsonl, read_grammar, read_prompts
from twotower.cli.text import printable
from twotower.engine import (
    Completion,
    EngineOptions,
    Event,
    Finished,
    GenerateOptions,
    TokensCommitted,
    defaults_of,
    resolve_options,
    stream,
)
from twotower.engine.notice import prompt_notice
from twotower.engine.options import Overlap
from twotower.families import read_config
from twotower.loading import Loaded, Placement, placement_of

_MAX_NOTED = 16  # prompts that are looked at before decoding begins
_KNOWN = "twotower demo shows what the shipped model knows, --model takes another"


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Prompts, answers and a grammar as files or JSON."""

    input: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File of prompts: .jsonl has one object a line, {"prompt": text or token ids}; any other
    file is one prompt, without its last line break."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the answers to a .jsonl --input of any length here, one JSON object a line, in order.
    A line may have an "id" and its own decoding options, named as flags. The same command again
    resumes."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text."""
    trace: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every event (StepTaken, TokensCommitted, Finished) as a line of JSON when it
    happens."""
    grammar: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """ar, speculative: JSON schema (.json), Lark grammar (.lark) or regular expression (any other
    file) that the text must match. Needs: pip install '.[serve]'."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How prompts share the machine. None of these options changes a text."""

    # As in EngineOptions, whose help they have.
    batch_size: int = EngineOptions.batch_size
    overlap: Overlap = EngineOptions.overlap
    prefix_cache_bytes: int = EngineOptions.prefix_cache_bytes
    lookup_cache_bytes: int = EngineOptions.lookup_cache_bytes


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(TextOptions, FileOptions, BatchOptions, Placement):
    """Complete prompts and print the new text. Applies no chat template: see twotower chat.

    The default of a decoding option is the checkpoint's (generation_config.json), else the one
    shown.
    """

    prompts: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[PROMPT ...]", help_behavior_hint=""),
    ] = ()
    """Prompts; - or none at all: one from stdin. Put -- before prompts that start with a dash."""
    prompt: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")
    ] = ()
    """A prompt, as another way to give one."""
    escape: bool = False
    r"""Replace \n, \t and \\ in --stop, --prompt and PROMPT by line break, tab and backslash."""
    decoding: Annotated[dict[str, object], decoding_flags()]
    """How to decode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.engine()
        if self.escape and not (self.prompts or self.prompt or self.stop):
            raise ValueError("escape: no effect without --stop or prompts that are arguments")
        if self.output is None:
            if self.decoding.get("logprobs") is not None and not (self.json or self.trace):
                raise ValueError(
                    "logprobs: text does not show them; use --json, --trace or --output"
                )
            return
        if self.input is None or not is_jsonl(self.input):
            raise ValueError(
                "output: is for prompts of a JSONL file; give one as --input FILE.jsonl"
            )
        if self.prompts or self.prompt or self.json or self.trace:
            raise ValueError(
                "output: takes the prompts of --input alone and writes lines of JSON; "
                "leave out other prompts, --json and --trace"
            )

    def given(self) -> dict[str, object]:
        """The decoding options that were named."""
        named = self.named(self.decoding, self.escape)
        return named if self.grammar is None else {**named, "grammar": read_grammar(self.grammar)}

    def generate_options(self) -> GenerateOptions:
        """Options of which only the given flags count as given."""
        given = self.given()
        return GenerateOptions(**given)  # type: ignore[arg-type]  # checked by __post_init__

    def engine(self) -> EngineOptions:
        """How prompts share the machine."""
        return EngineOptions(
            batch_size=self.batch_size,
            overlap=self.overlap,
            prefix_cache_bytes=self.prefix_cache_bytes,
            lookup_cache_bytes=self.lookup_cache_bytes,
        )


def run(options: GenerateArguments) -> int:
    """Generate; returns the exit status. Errors of the user arrive as ValueError."""
    read_config(options.find())  # an unknown model is refused before its prompts are read
    decoding = options.generate_options()
    refuse_without_denoiser(options, decoding)
    if options.input is not None and options.output is not None:
        from twotower.cli.offline import complete_file

        engine = options.engine()
        return complete_file(options.input, options.output, placement_of(options), decoding, engine)
    prompts = read_prompts([*options.prompts, *options.prompt], options.input, options.escape)
    with _open_trace(options.trace) as trace:
        loaded = load_with_bar(placement_of(options), decoding.mode, only_decodes=True)
        if any(isinstance(prompt, str) for prompt in prompts):
            loaded.need_tokenizer()
        events = stream(loaded.model, prompts, decoding, loaded.tokenizer, options.engine())
        _note_unfamiliar(loaded, prompts)
        start = time.perf_counter()
        events = events if trace is None else _traced(events, trace)
        is_live = len(prompts) == 1 and not options.json and sys.stdout.isatty()
        completions = _finished(_shown(events) if is_live else events)
        seconds = time.perf_counter() - start
    _note_empty(loaded, completions)
    if options.json:
        record = _record(options, decoding, loaded, prompts, completions, seconds)
        print(json.dumps(record, indent=2))
    elif is_live:
        _print_figures(completions[0], seconds)
    else:
        _print_texts(completions)
    return 0


def _note_unfamiliar(loaded: Loaded, prompts: Sequence[Prompt]) -> None:
    """One line on stderr for the first prompt that the model was not made for."""
    for number, prompt in enumerate(prompts[:_MAX_NOTED]):
        ids = loaded.need_tokenizer().encode_prompt(prompt) if isinstance(prompt, str) else prompt
        if (notice := prompt_notice(loaded.model, ids)) is not None:
            print(f"note: prompt {number} is {notice}; {_KNOWN}", file=sys.stderr)
            return


def _note_empty(loaded: Loaded, completions: Sequence[Completion]) -> None:
    """One line on stderr for a text that ends at once, where a chat template would help."""
    empty = [row for row, completion in enumerate(completions) if completion.text == ""]
    if empty and loaded.need_tokenizer().chat_template is not None:
        print(
            f"note: the model ended the text of prompt {empty[0]} at once; it has a chat template, "
            "which twotower chat applies",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _open_trace(file: Path | None) -> Iterator[BinaryIO | None]:
    if file is None:
        yield None
        return
    try:
        trace = file.open("wb", buffering=0)  # nothing waits: a killed run leaves whole lines
    except OSError as error:
        raise ValueError(f"trace: cannot write {file} ({error.strerror})") from None
    with trace:
        yield trace


def _traced(events: Iterable[Event], trace: BinaryIO) -> Iterator[Event]:
    for event in events:
        line = json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)})
        try:
            trace.write(f"{line}\n".encode())
        except OSError as error:
            raise ValueError(f"trace: cannot write {trace.name} ({error.strerror})") from None
        yield event


def _shown(events: Iterable[Event]) -> Iterator[Event]:
    """Print what is committed at once."""
    for event in events:
        if isinstance(event, TokensCommitted):
            print(printable(event.text), end="", flush=True)
        yield event


def _finished(events: Iterable[Event]) -> list[Completion]:
    """The completions in the prompts' order."""
    results = {event.row: event.completion for event in events if isinstance(event, Finished)}
    return [results[row] for row in sorted(results)]


def _print_figures(completion: Completion, seconds: float) -> None:
    """Finish a streamed text: its last line break, and the cost on stderr."""
    tokens, rate = len(completion.tokens), completion.tokens_per_nfe
    drafted = ("lookup", completion.lookup_tokens), ("the denoiser", completion.denoiser_tokens)
    print(" ".join(map(str, completion.tokens)) if completion.text is None else "")
    parts = [
        f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f} tokens/s)",
        f"NFE {completion.nfe}" + ("" if rate is None else f" ({rate:.1f} tokens each)"),
        f"context forwards {completion.context_forwards}",
        *(f"{n} tokens from {name}" for name, n in drafted if n),
        f"ended by {completion.finish_reason}",
    ]
    print(", ".join(parts), file=sys.stderr)


def _print_texts(completions: Sequence[Completion]) -> None:
    """The new text alone; with several prompts, a line before each says whose it is."""
    for number, completion in enumerate(completions):
        if len(completions) > 1:
            print(f"==> prompt {number} <==")
        text = completion.text
        print(" ".join(map(str, completion.tokens)) if text is None else text)


def _used(options: Placement, loaded: Loaded) -> Placement:
    """The placement, with what ran."""
    backend = loaded.model.backend
    return placement_of(options, backend=backend.name, quantization=backend.quantization)


def _record(
    options: Placement,
    decoding: GenerateOptions,
    loaded: Loaded,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    seconds: float,
) -> dict[str, object]:
    resolved = resolve_options(decoding, defaults_of(loaded.model))
    results = [
        {
            "prompt": prompt,
            **completion_record(completion),
            "tokens_per_nfe": completion.tokens_per_nfe,
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return {
        "model": loaded.name,
        "options": dataclasses.asdict(resolved) | dataclasses.asdict(_used(options, loaded)),
        "results": results,
        "seconds": seconds,
        "tokens_per_s": sum(len(c.tokens) for c in completions) / seconds,
    }
