"""The file of results of `twotower generate --output`: one JSON object a line, resumable.

Every line names the input line it answers and carries a key: eight digits for the model and the
options, eight for the input line. So a file says by itself how far it is and what it belongs to.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from twotower.engine import Completion, ResolvedOptions
from twotower.file_lock import try_lock
from twotower.loading import Loaded
from twotower.tokenizer import CHAT_TEMPLATE_FILE

MAX_LINE_BYTES = 4 << 20  # of the input; to encode them takes some hundred times as many
_MAX_RESULT_BYTES = 256 << 20
_SAMPLED = 64  # values of each tensor that identify a model


def completion_record(completion: Completion) -> dict[str, object]:
    """What was written and what it cost; how probable each token is, where that was asked."""
    record: dict[str, object] = {
        "text": completion.text,
        "tokens": completion.tokens,
        "nfe": completion.nfe,
        "context_forwards": completion.context_forwards,
        "lookup_tokens": completion.lookup_tokens,
        "denoiser_tokens": completion.denoiser_tokens,
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        record["logprobs"] = [dataclasses.asdict(one) for one in completion.logprobs]
    return record


class InputLine(NamedTuple):
    """A line of the input that is not blank; `number` counts from 1."""

    number: int
    content: bytes | None  # None: longer than MAX_LINE_BYTES
    digest: str


def read_lines(file: Path) -> Iterator[InputLine]:
    """The lines of a file that are not blank, one at a time; ValueError if it cannot be read.

    However long a line is, no more than MAX_LINE_BYTES of it are held.
    """
    try:
        with file.open("rb") as stream:
            for number in itertools.count(1):
                content = stream.readline(MAX_LINE_BYTES + 1)
                if not content:
                    return
                if len(content) > MAX_LINE_BYTES and not content.endswith(b"\n"):
                    yield InputLine(number, None, _digest_of_rest(content, stream))
                elif content := content.strip():
                    yield InputLine(number, content, hashlib.sha256(content).hexdigest()[:8])
    except OSError as error:
        raise ValueError(f"input: cannot read {file} ({error.strerror})") from None


def _digest_of_rest(beginning: bytes, stream: BinaryIO) -> str:
    """Read a line to its end, part by part."""
    digest, part = hashlib.sha256(), beginning
    while part:
        digest.update(part)
        part = b"" if part.endswith(b"\n") else stream.readline(1 << 16)
    return digest.hexdigest()[:8]


def run_key(loaded: Loaded, options: ResolvedOptions) -> str:
    """Eight hexadecimal digits for all that decides a text beside its line."""
    digest, model = hashlib.sha256(repr(dataclasses.astuple(options)).encode()), loaded.model
    if model.kv_dtype != model.dtype:
        digest.update(str(model.kv_dtype).encode())
    for name, tensor in model.values():
        # In half precision, too, where passes compute in float32.
        dtype = torch.promote_types(tensor.dtype, model.dtype)
        dtype = dtype if tensor.is_floating_point() else tensor.dtype
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // _SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(tensor.shape)} {dtype}".encode())
        digest.update(some.contiguous().numpy().tobytes())
    if loaded.tokenizer is not None:
        for name, content in loaded.tokenizer.files().items():
            if name != CHAT_TEMPLATE_FILE:  # a line's prompt is no chat
                digest.update(content)
    return digest.hexdigest()[:8]


class OutputFile:
    """Results in the order of the input, appended line by line; nothing is ever rewritten."""

    def __init__(self, file: Path) -> None:
        """ValueError (one line) if the file cannot be written, or another run writes it."""
        self._file = file
        self.counts: Counter[str] = Counter()  # lines by "done" and, among them, "refused"
        try:
            self._stream = file.open("a+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        is_file = stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode)  # not a device or a pipe
        if is_file and not try_lock(self._stream.fileno()):
            self._stream.close()
            raise ValueError(
                f"output: {file} is being written by another run; wait for its end, or give "
                "another file"
            )

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
        for number in itertools.count(1):
            content = self._stream.readline(_MAX_RESULT_BYTES)
            if not content.endswith(b"\n") and len(content) < _MAX_RESULT_BYTES:
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
    return f"{key}-{line.digest}"
