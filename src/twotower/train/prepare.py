"""From documents to a token shard: the built-in corpus or files of text -> tokenizer + tokens.

Decides how a document becomes tokens: bos + prompt + completion + eos, packed back to back. Prompt
and completion are encoded apart, because at inference the prompt is encoded alone: a token that
spans both would never be seen there. Everything is written aside and renamed, so a shard is whole
or absent.
"""

from __future__ import annotations

import errno
import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from twotower.train.prepare_options import PrepareOptions
from twotower.train.readers import Text
from twotower.train.shard import META_FILE, ShardMeta, choose_dtype
from twotower.train.shard_writer import ShardWriter
from twotower.train.sources import Source, find_sources, mix, parse_weights, shuffle

logger = logging.getLogger(__name__)

DEFAULT_VOCAB_SIZE = 1024
_BATCH = 512  # documents tokenised at once
_BATCH_CHARACTERS = 1 << 20  # or fewer, if they are this long together
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Encoded = tuple[list[int], int]  # tokens, and how many of them stand before the completion


@dataclass(frozen=True, kw_only=True)
class PrepareProgress:
    """How far preparation is; `stage` is what runs now, `sources` are tokens by source."""

    stage: str
    tokens: int
    documents: int
    sources: Mapping[str, int]


def prepare(options: PrepareOptions) -> Iterator[PrepareProgress]:
    """Do the whole preparation, yielding progress; the shard exists only after the last record."""
    out = options.out
    partial, old = (out.with_name(f"{out.name}.{end}") for end in ("partial", "old"))
    _restore(out, old)
    _check_out(options)
    sources = _get_sources(options)
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    try:
        partial.mkdir(parents=True)
        yield PrepareProgress(stage="tokenizer", tokens=0, documents=0, sources={})
        tokenizer = _get_tokenizer(options, sources)
        tokenizer.save(partial)
        yield from _write_shard(options, sources, tokenizer, partial)
        _move_into_place(partial, out, old)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise ValueError(
            f"out: no room for {partial} ({error.strerror}), {out} is as it was; make room or "
            "choose another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _get_sources(options: PrepareOptions) -> list[Source]:
    weights = parse_weights(options.weights)
    return find_sources(options.input, weights, options.columns, options.seed)


def _get_texts(options: PrepareOptions, sources: Sequence[Source]) -> list[Iterator[Text]]:
    """A fresh stream of every source, shuffled if that was asked for."""
    streams = [source.texts() for source in sources]
    if options.shuffle == 0:
        return streams
    return [
        shuffle(stream, options.shuffle, f"shuffle:{options.seed}:{index}")
        for index, stream in enumerate(streams)
    ]


def _get_tokenizer(options: PrepareOptions, sources: Sequence[Source]) -> Tokenizer:
    if options.tokenizer is None:
        weights = [source.weight for source in sources]
        mixed = mix(_get_texts(options, sources), weights, _num_characters, is_strict=False)
        sample = itertools.islice(mixed, options.tokenizer_documents)
        return train_tokenizer(
            (part for _, text in sample for part in text), options.vocab_size or DEFAULT_VOCAB_SIZE
        )
    tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ValueError(
            f"tokenizer: {options.tokenizer} names no bos or eos token; "
            "add bos_token and eos_token to its tokenizer_config.json"
        )
    return tokenizer


def _num_characters(text: Text) -> int:
    return len(text[0]) + len(text[1])


def _write_shard(
    options: PrepareOptions, sources: Sequence[Source], tokenizer: Tokenizer, folder: Path
) -> Iterator[PrepareProgress]:
    dtype = choose_dtype(tokenizer.vocab_size)
    by_source = dict.fromkeys((source.name for source in sources), 0)
    with ShardWriter(folder, dtype, options.part_tokens) as writer:
        yield _get_progress(writer, by_source)
        for at, (ids, context) in _mix_encoded(options, sources, tokenizer):
            writer.append(ids, context)
            by_source[sources[at].name] += len(ids)
            if writer.num_documents % _BATCH == 0:
                yield _get_progress(writer, by_source)
            if options.limit is not None and writer.num_tokens >= options.limit:
                break
        else:
            _warn_of_end(options, sources, writer.num_tokens)
    yield _get_progress(writer, by_source)
    assert tokenizer.bos_id is not None
    ShardMeta(
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        dtype=dtype,
        parts=writer.parts(),
        tokenizer_sha256=tokenizer.fingerprint,
        sources=by_source,
        seed=options.seed,
        align=options.align,
    ).write(folder)


def _get_progress(writer: ShardWriter, by_source: Mapping[str, int]) -> PrepareProgress:
    return PrepareProgress(
        stage="tokens",
        tokens=writer.num_tokens,
        documents=writer.num_documents,
        sources=dict(by_source),
    )


def _mix_encoded(
    options: PrepareOptions, sources: Sequence[Source], tokenizer: Tokenizer
) -> Iterator[tuple[int, Encoded]]:
    """Encoded documents in the order of the shard, each with the index of its source."""
    streams = [
        _encode_stream(tokenizer, texts, options.align) for texts in _get_texts(options, sources)
    ]
    weights = [source.weight for source in sources]
    return mix(streams, weights, lambda encoded: len(encoded[0]), bool(options.weights))


def _warn_of_end(options: PrepareOptions, sources: Sequence[Source], num_tokens: int) -> None:
    """A mixture ends with its first source: say so, the rest of the others is left out."""
    if options.weights and len(sources) > 1:
        logger.warning("one input has ended: the mixture stops at %d tokens", num_tokens)


def _encode_stream(tokenizer: Tokenizer, texts: Iterable[Text], align: int) -> Iterator[Encoded]:
    batch: list[Text] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += _num_characters(text)
        if len(batch) == _BATCH or held >= _BATCH_CHARACTERS:
            yield from encode_documents(tokenizer, batch, align)
            batch, held = [], 0
    yield from encode_documents(tokenizer, batch, align)


def encode_documents(tokenizer: Tokenizer, texts: Sequence[Text], align: int = 1) -> list[Encoded]:
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


def _restore(out: Path, old: Path) -> None:
    """Put back what a run that was killed between the two renames had moved away."""
    if not out.exists() and (old / META_FILE).is_file():
        old.rename(out)


def _move_into_place(partial: Path, out: Path, old: Path) -> None:
    """Rename `partial` to `out`; a shard that was there is deleted only after the new one is in
    place.
    """
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
