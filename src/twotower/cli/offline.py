"""`twotower generate --input FILE --output FILE`: any number of prompts, line by line.

Lines are read as slots become free and written in the input's order, so that memory holds a
window of them; the same command again resumes where a killed one stopped.
"""

import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from twotower.arguments import nearest
from twotower.cli.flags import by_field, spellings
from twotower.cli.output_file import (
    MAX_LINE_BYTES,
    InputLine,
    OutputFile,
    completion_record,
    read_lines,
    run_key,
)
from twotower.cli.progress import load_with_bar, progress_bar
from twotower.cli.prompts import parse_prompt
from twotower.engine import (
    EngineOptions,
    Failed,
    Finished,
    GenerateOptions,
    Request,
    defaults_of,
    resolve_options,
    stream_requests,
)
from twotower.engine.grammar import shortened
from twotower.engine.resolved import FIELD_MODES, SAMPLED_ONLY
from twotower.loading import Loaded, Placement

REFUSED_LINES = 3  # exit status: all is done, but some lines were no request
# Lines between the first unwritten and the last read, for each slot: a long text holds up the
# writing of the short ones behind it, and decoding should not wait.
_WINDOW = 16
_OPTION_NAMES = [field.name for field in dataclasses.fields(GenerateOptions)]
_SPELLINGS = spellings(GenerateOptions)


def complete_file(
    source: Path,
    target: Path,
    placement: Placement,
    options: GenerateOptions,
    engine: EngineOptions,
) -> int:
    """Decode every line of the source; returns the exit status."""
    total = sum(1 for _ in read_lines(source))
    with OutputFile(target) as output:
        loaded = load_with_bar(placement, options.mode, only_decodes=True)
        key = run_key(loaded, resolve_options(options, defaults_of(loaded.model)))
        lines = read_lines(source)
        output.resume(lines, key)
        before, start = output.counts["done"], time.perf_counter()
        window = Window(lines, output, key, options, _WINDOW * engine.batch_size)
        num_tokens = _decode(loaded, engine, window, total)
        seconds = time.perf_counter() - start
    done, refused = output.counts["done"], output.counts["refused"]
    print(
        f"{done - before} lines in {seconds:.1f} s ({num_tokens / seconds:.0f} tokens/s), "
        f"{before} were done before; {refused} of {done} refused",
        file=sys.stderr,
    )
    return REFUSED_LINES if refused else 0


def _decode(loaded: Loaded, engine: EngineOptions, window: "Window", total: int) -> int:
    """Run the scheduler over the window's lines; returns how many tokens were written."""
    num_tokens = 0
    with progress_bar() as bar:
        task, start = bar.add_task("", total=total), time.perf_counter()
        events = stream_requests(loaded.model, window.requests(), loaded.tokenizer, engine)
        for event in events:
            if isinstance(event, Finished):
                num_tokens += len(event.completion.tokens)
                window.answer(event.row, completion_record(event.completion))
            elif isinstance(event, Failed):
                window.answer(event.row, {"error": event.message})
            else:
                continue
            rate = num_tokens / (time.perf_counter() - start)
            bar.update(task, completed=window.num_done, description=f"{rate:.0f} tokens/s")
        bar.update(task, completed=window.num_done)
    return num_tokens


@dataclass
class _Entry:
    line: InputLine
    copied: dict[str, object]  # what the result takes over from the line
    result: dict[str, object] | None = None


class Window:
    """Lines on their way, in order: read when there is room, written when all before them are."""

    def __init__(
        self,
        lines: Iterator[InputLine],
        output: OutputFile,
        key: str,
        options: GenerateOptions,
        size: int,
    ) -> None:
        """options: the command's; size: the most lines that it holds."""
        self._lines, self._output, self._key = lines, output, key
        self._given, self._size = options.given(), size
        self._entries: deque[_Entry] = deque()
        self._requested: dict[int, _Entry] = {}

    @property
    def num_done(self) -> int:
        """Lines that are written, earlier runs included."""
        return self._output.counts["done"]

    def requests(self) -> Iterator[Request | None]:
        """The requests of the lines; None while the window is full. Bad lines are answered."""
        number = 0
        for line in self._lines:
            while len(self._entries) >= self._size:
                yield None
            entry = _Entry(line, {})
            self._entries.append(entry)
            try:
                record = _parse(line)
                if "id" in record:
                    entry.copied["id"] = record["id"]
                request = _request(record, self._given)
            except ValueError as error:
                self._set(entry, {"error": shortened(str(error))})
                continue
            self._requested[number] = entry
            number += 1
            yield request

    def answer(self, row: int, result: dict[str, object]) -> None:
        """The result of the request `row`."""
        self._set(self._requested.pop(row), result)

    def _set(self, entry: _Entry, result: dict[str, object]) -> None:
        """Note a result, and write it and all that waited for it."""
        if "error" in result:
            print(f"line {entry.line.number}: {result['error']}", file=sys.stderr)
        entry.result = result
        while self._entries and (ready := self._entries[0].result) is not None:
            first = self._entries.popleft()
            self._output.write(first.line, self._key, {**first.copied, **ready})


def _parse(line: InputLine) -> dict[str, object]:
    if line.content is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MiB; split it, or leave it out")
    try:
        record = json.loads(line.content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}); convert it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise ValueError('not an object; write {"prompt": ...}')
    try:
        json.dumps(record.get("id"), ensure_ascii=False).encode()  # as its result repeats it
    except (ValueError, RecursionError):
        raise ValueError("its id is half a character or nested too deeply; give text") from None
    return record


def _request(record: Mapping[str, object], given: Mapping[str, object]) -> Request:
    """Prompt and options of one line, which win over the command's."""
    prompt = parse_prompt(record, "the line")
    named = by_field(record, _SPELLINGS)
    own = {name: value for name, value in named.items() if name not in ("prompt", "id")}
    for name in own:
        if name not in _OPTION_NAMES:
            near = nearest(name[:50], [*_OPTION_NAMES, "prompt", "id"])
            raise ValueError(f"{name[:50]!r} is not an option{near}; see twotower generate -h")
    values = {**_defaults_beside(own, given), **own}
    return Request(prompt, GenerateOptions(**values))  # type: ignore[arg-type]  # checks itself


def _defaults_beside(
    own: Mapping[str, object], given: Mapping[str, object]
) -> Mapping[str, object]:
    """The command's options that count beside a line's own."""
    mode, unused = own.get("mode", given.get("mode")), set[str]()
    if mode is not None:
        unused |= {name for name, modes in FIELD_MODES.items() if mode not in modes}
    if own.get("temperature") == 0:
        unused |= set(SAMPLED_ONLY)
    if own.get("eos_token_id") is not None:
        unused.add("ignore_eos")
    return {name: value for name, value in given.items() if name not in unused}
