"""The file of results of `twotower generate --output`: one JSON object a line, resumable.

Every line names the input line it answers and carries a key: eight digits for the model and the
options, eight for the input line. So a file says by itself how far it is and what it belongs to.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from twotower.engine import ResolvedOptions
from twotower.loading import Loaded

_SAMPLED = 64  # values of each tensor that identify a model


class InputLine(NamedTuple):
    """A line of the input that is not blank; `number` counts from 1."""

    number: int
    content: bytes


def read_lines(file: Path) -> Iterator[InputLine]:
    """The lines of a file that are not blank, one at a time; ValueError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            for number, content in enumerate(stream, 1):
                if content.strip():
                    yield InputLine(number, content.strip())
    except OSError as error:
        raise ValueError(f"input: cannot read {file} ({error.strerror})") from None


def run_key(loaded: Loaded, options: ResolvedOptions) -> str:
    """Eight hexadecimal digits for all that decides a text beside its line."""
    digest = hashlib.sha256(repr(dataclasses.astuple(options)).encode())
    for name, tensor in sorted(loaded.model.state_dict().items()):
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // _SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.contiguous().numpy().tobytes())
    if loaded.tokenizer is not None:
        for content in loaded.tokenizer.files().values():
            digest.update(content)
    return digest.hexdigest()[:8]


class OutputFile:
    """Results in the order of the input, appended line by line; nothing is ever rewritten."""

    def __init__(self, file: Path) -> None:
        """ValueError (one line) if the file cannot be written."""
        self._file = file
        self.counts: Counter[str] = Counter()  # lines by "done" and, among them, "refused"
        try:
            self._stream = file.open("a+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def resume(self, lines: Iterator[InputLine], key: str) -> None:
        """Take from `lines` those that are answered already, and cut off a line that a kill broke.

        ValueError (one line) if the file belongs to another input, model or other options.
        """
        if not os.fstat(self._stream.fileno()).st_size:  # new, or a device
            return
        self._stream.seek(0)
        end = 0
        for number, content in enumerate(self._stream, 1):
            if not content.endswith(b"\n"):
                break
            self._require_answer(number, content, next(lines, None), key)
            end += len(content)
        self._stream.truncate(end)
        self._stream.seek(end)

    def write(self, line: InputLine, key: str, result: dict[str, object]) -> None:
        """Append the result of a line, whole."""
        record = {"line": line.number, "key": _key(line, key), **result}
        content = f"{json.dumps(record, ensure_ascii=False)}\n".encode()
        try:
            written = self._stream.write(content)
            while written < len(content):  # a full disk takes a part first and refuses then
                written += self._stream.write(content[written:])
        except OSError as error:
            raise self._unwritable(error) from None
        self._count(result)

    def _require_answer(
        self, number: int, content: bytes, line: InputLine | None, key: str
    ) -> None:
        try:
            record = json.loads(content)
            found = str(record["key"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"output: {self._file} line {number} was not written by this command; "
                "give another file"
            ) from None
        if line is not None and found == _key(line, key):
            self._count(record)
            return
        other = "with another model or other options" if found[:8] != key else "from another input"
        raise ValueError(
            f"output: {self._file} line {number} was written {other}; "
            "give another file, or the same command to go on"
        )

    def _count(self, record: dict[str, object]) -> None:
        self.counts["done"] += 1
        self.counts["refused"] += "error" in record

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(f"output: cannot write {self._file} ({error.strerror})")


def _key(line: InputLine, key: str) -> str:
    return f"{key}-{hashlib.sha256(line.content).hexdigest()[:8]}"
