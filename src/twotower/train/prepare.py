"""From documents to a token shard: the built-in corpus, a text file or JSONL -> tokenizer + tokens.

Decides how a document becomes tokens: bos + prompt + completion + eos, packed back to back. Prompt
and completion are encoded apart, because at inference the prompt is encoded alone: a token that
spans both would never be seen there. Everything is written aside and renamed, so a shard is whole
or absent.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from twotower.corpus import documents
from twotower.tokenizer import MIN_VOCAB_SIZE, Tokenizer, load_tokenizer, train_tokenizer
from twotower.train.data import (
    COMPLETIONS_FILE,
    META_FILE,
    TOKENS_FILE,
    ShardMeta,
    choose_dtype,
    numpy_dtype,
)

DEFAULT_VOCAB_SIZE = 1024
_BATCH = 512  # documents tokenised at once


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Turn text into a tokenizer and a shard of tokens for training."""

    out: Path = Path("data/corpus")
    """Folder to create; it must not exist yet, unless --overwrite is given."""
    input: Path | None = None
    """Text to use instead of the built-in corpus. A .jsonl file holds one object a line, {"text"}
    or {"prompt", "completion"}; any other file is text whose documents are separated by blank
    lines."""
    tokens: int = 20_000_000
    """Stop after this many tokens (the last document stays whole); a file may end earlier."""
    tokenizer: Path | None = None
    """Tokenizer to reuse: a folder with tokenizer.json. By default one is trained on the same
    text.
    """
    vocab_size: int | None = None
    """Size of the tokenizer to train: at least 260, 1024 if not given. Not together with
    --tokenizer.
    """
    tokenizer_documents: int = 40_000
    """The tokenizer is trained on this many documents from the start of the text."""
    seed: int = 0
    """Seed of the built-in corpus. Every document depends on it."""
    weights: tuple[str, ...] = ()
    """Mixture of the built-in corpus instead of its own, as in math=2 code=1."""
    align: int = 1
    """Fill up with EOS so that every completion begins and ends on a multiple of this: with the
    block size, a denoiser trains on the blocks that it will meet. 1 packs back to back."""
    overwrite: bool = False
    """Replace an existing shard in the folder once the new one is complete."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens: {self.tokens} is too few; use at least 1")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError(
                "vocab_size: a given tokenizer has its own; leave out vocab_size or tokenizer"
            )
        if self.vocab_size is not None and self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size: {self.vocab_size} is too small; use at least {MIN_VOCAB_SIZE}"
            )
        if self.tokenizer_documents < 1:
            raise ValueError(
                f"tokenizer_documents: {self.tokenizer_documents} is too few; use at least 1"
            )
        if self.align < 1:
            raise ValueError(f"align: {self.align} is too small; use at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative; use 0 or more")


@dataclass(frozen=True, kw_only=True)
class PrepareProgress:
    """How far preparation is; `stage` is what runs now."""

    stage: str
    tokens: int
    documents: int


Text = tuple[str, str]  # prompt, completion


def prepare(options: PrepareOptions) -> Iterator[PrepareProgress]:
    """Do the whole preparation, yielding progress; the shard exists only after the last record."""
    _check_out(options)
    partial = options.out.with_name(f"{options.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        yield PrepareProgress(stage="tokenizer", tokens=0, documents=0)
        tokenizer = _get_tokenizer(options)
        tokenizer.save(partial)
        yield from _write_shard(options, tokenizer, partial)
        _move_into_place(partial, options.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_texts(options: PrepareOptions) -> Iterator[Text]:
    """(prompt, completion) pairs of the chosen source; plain text has an empty prompt."""
    if options.input is None:
        return (
            (document.prompt, document.completion)
            for document in documents("train", options.seed, parse_weights(options.weights))
        )
    if not options.input.is_file():
        raise ValueError(
            f"input: no file {options.input}; give a text or .jsonl file, or leave it out"
        )
    return (
        _read_jsonl(options.input)
        if options.input.suffix == ".jsonl"
        else _read_text(options.input)
    )


def parse_weights(pairs: Sequence[str]) -> dict[str, float] | None:
    """Weights by category from NAME=NUMBER pairs, None without any; ValueError for other text."""
    weights: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"weights: {pair!r} is not NAME=NUMBER, as in math=2") from None
    return weights or None


def _read_jsonl(file: Path) -> Iterator[Text]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_record(line, f"input: {file} line {number}")


def _parse_record(line: str, where: str) -> Text:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); write one object a line") from error
    fields = record if isinstance(record, dict) else {}
    pair = (
        ("", fields["text"])
        if "text" in fields
        else (fields.get("prompt"), fields.get("completion"))
    )
    prompt, completion = pair
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(f'{where} lacks strings "text" or "prompt" and "completion"; add them')
    return prompt, completion


def _read_text(file: Path) -> Iterator[Text]:
    with file.open(encoding="utf-8") as lines:
        for is_blank, group in itertools.groupby(lines, lambda line: not line.strip()):
            if not is_blank:
                yield "", "".join(group)


def _get_tokenizer(options: PrepareOptions) -> Tokenizer:
    if options.tokenizer is None:
        sample = itertools.islice(read_texts(options), options.tokenizer_documents)
        return train_tokenizer(
            (part for text in sample for part in text), options.vocab_size or DEFAULT_VOCAB_SIZE
        )
    tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ValueError(
            f"tokenizer: {options.tokenizer} names no bos or eos token; "
            "add bos_token and eos_token to its tokenizer_config.json"
        )
    return tokenizer


def _write_shard(
    options: PrepareOptions, tokenizer: Tokenizer, folder: Path
) -> Iterator[PrepareProgress]:
    writer = _ShardWriter(folder, choose_dtype(tokenizer.vocab_size))
    with writer.tokens.stream, writer.completions.stream:
        texts = read_texts(options)
        while writer.num_tokens < options.tokens and (
            batch := list(itertools.islice(texts, _BATCH))
        ):
            writer.append(encode_documents(tokenizer, batch, options.align), options.tokens)
            yield PrepareProgress(
                stage="tokens", tokens=writer.num_tokens, documents=writer.num_documents
            )
    if writer.num_tokens == 0:
        raise ValueError(
            f"input: {options.input} holds no text; give a file with at least one document"
        )
    assert tokenizer.bos_id is not None
    ShardMeta(
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        dtype=writer.tokens.dtype,
        tokens_sha256=writer.tokens.hash.hexdigest(),
        completions_sha256=writer.completions.hash.hexdigest(),
        tokenizer_sha256=tokenizer.fingerprint,
        source="built-in corpus" if options.input is None else options.input.name,
        seed=options.seed,
        align=options.align,
    ).write(folder)


Encoded = tuple[list[int], int]  # tokens, and how many of them stand before the completion


def encode_documents(tokenizer: Tokenizer, texts: list[Text], align: int = 1) -> list[Encoded]:
    """Each (prompt, completion) as bos + prompt + completion + eos.

    With `align`, more eos before bos and at the end: prompt and completion each fill up a multiple.
    """
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
    parts = tokenizer.encode_batch([part for text in texts for part in text])
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    documents = []
    for prompt, completion in zip(parts[::2], parts[1::2], strict=True):
        before, after = -(1 + len(prompt)) % align, -(len(completion) + 1) % align
        context = [*[eos] * before, bos, *prompt]
        documents.append(([*context, *completion, *[eos] * (1 + after)], len(context)))
    return documents


class _ArrayWriter:
    """Appends numbers to a file, hashing on the way."""

    def __init__(self, file: Path, dtype: str) -> None:
        self.stream: BinaryIO = file.open("wb")
        self.dtype = dtype
        self.hash = hashlib.sha256()

    def append(self, values: list[int]) -> None:
        data = np.asarray(values, dtype=numpy_dtype(self.dtype)).tobytes()
        self.hash.update(data)
        self.stream.write(data)


class _ShardWriter:
    """Appends documents to a shard's two files, counting on the way."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.tokens = _ArrayWriter(folder / TOKENS_FILE, dtype)
        self.completions = _ArrayWriter(folder / COMPLETIONS_FILE, "uint8")
        self.num_tokens = 0
        self.num_documents = 0

    def append(self, encoded: list[Encoded], limit: int) -> None:
        """Write whole documents until `limit` tokens are reached."""
        kept: list[int] = []
        is_completion: list[int] = []
        for ids, context in encoded:
            if self.num_tokens >= limit:
                break
            kept.extend(ids)
            is_completion.extend([0] * context + [1] * (len(ids) - context))
            self.num_tokens += len(ids)
            self.num_documents += 1
        self.tokens.append(kept)
        self.completions.append(is_completion)


def _check_out(options: PrepareOptions) -> None:
    out = options.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / META_FILE).is_file():
        raise ValueError(f"out: {out} exists and is not a token shard; choose another folder")
    if not options.overwrite:
        raise ValueError(
            f"out: {out} already holds a token shard; choose another folder or add --overwrite"
        )


def _move_into_place(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; a shard that was there is deleted only after the new one is in
    place.
    """
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
