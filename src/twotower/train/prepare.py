"""From documents to a token shard: files of text or a generated corpus -> tokenizer + tokens.

Decides how a document becomes tokens: bos (where the tokenizer puts one before a prompt) + prompt +
completion + eos, packed back to back. Prompt and completion are encoded apart, because at inference
the prompt is encoded alone: a token that spans both would never be seen there. Everything is
written aside and renamed, so a shard is whole or absent.
"""

import errno
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from twotower.arguments import require
from twotower.checkpoint import find_tokenizer
from twotower.checkpoint.write import replacing, restore
from twotower.documented import public_options
from twotower.tokenizer import Tokenizer, train_tokenizer
from twotower.train.options import CheckedOptions
from twotower.train.readers import Text
from twotower.train.shard import META_FILE, ShardMeta, ShardWriter, choose_dtype
from twotower.train.sources import (
    BUILT_IN,
    Corpus,
    Source,
    find_sources,
    mix,
    parse_weights,
    shuffle,
)
from twotower.train.special_tokens import find_special_tokens, open_tokenizer

logger = logging.getLogger(__name__)

DEFAULT_VOCAB_SIZE = 1024
_CORPUS_TOKENS = 20_000_000
_BATCH = 512  # documents tokenised at once
_BATCH_CHARACTERS = 1 << 20  # or fewer, if they are this long together
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Tokens, at which of them the document begins, how many of them stand before the completion.
Encoded = tuple[list[int], int, int]


@public_options
@dataclass(frozen=True, kw_only=True)
class PrepareOptions(CheckedOptions):
    """Turn text into a tokenizer and a shard of tokens for training."""

    output: Path = Path("data/corpus")
    """Folder to create; an existing one needs `overwrite`."""
    input: tuple[Path, ...] = ()
    """Files, folders, or quoted patterns such as 'books/*.parquet'. .jsonl (an object a line) and
    .parquet have `columns`; others are plain text, documents separated by blank lines. .gz, .bz2
    and .xz are unpacked. Default: the built-in corpus."""
    columns: tuple[str, ...] = ()
    """Columns to read: one of text, or one of prompts and one of completions. Default: "text", or
    "prompt" and "completion"."""
    weights: tuple[str, ...] = ()
    """Mixture of the inputs, such as a=3 b=1: relative numbers of tokens, until one input ends. An
    input is named by its file or folder without suffix, or as it was given. Without `input`: the
    mixture of the built-in corpus by its categories, such as math=2. Categories beside inputs add
    the built-in corpus as one more input, whose weight is their sum. Default: all inputs to their
    end."""
    tokens: int | None = None
    """Stop after this many tokens, with a whole document. Default: 20 million of the built-in
    corpus, or all inputs."""
    tokenizer: Path | None = None
    """Tokenizer to use: tokenizer.json, its folder, a GGUF file or a hub id. To train from a model
    (twotower train --init), give its own. Default: train one on the text."""
    bos_token: str | None = None
    """Token of `tokenizer`, as its vocabulary writes it, with which every document and prompt
    begins. Default: as its configuration says."""
    eos_token: str | None = None
    """Token of `tokenizer` that ends every document. Default: as its configuration says."""
    mask_token: str | None = None
    """Special token of `tokenizer` for masked positions. Default: as its configuration says, or a
    new id after the last."""
    vocab_size: int | None = None
    """Vocabulary size of the tokenizer to train, at least 260. Default: 1024."""
    tokenizer_documents: int = 40_000
    """Number of documents, the first ones, on which the tokenizer is trained."""
    seed: int = 0
    """Seed of the built-in corpus and of `shuffle`."""
    shuffle: int = 0
    """Size of the shuffle buffer of each input, in documents, for inputs that are sorted by
    subject. 0 is off. Training shuffles rows anyway."""
    align: int = 1
    """Pad with EOS so that completions begin and end at multiples of this many tokens. Give the
    block size to train a denoiser on blocks as it will generate them. 1 packs documents without
    padding."""
    overwrite: bool = False
    """Replace an existing shard in the folder once the new one is complete."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError(
                "vocab_size: a given tokenizer has its own; leave out vocab_size or tokenizer=..."
            )
        for name in ("bos_token", "eos_token", "mask_token"):
            if getattr(self, name) is not None and self.tokenizer is None:
                raise ValueError(
                    f"{name}: no effect on a tokenizer trained here; give tokenizer=..."
                )
        parse_weights(self.weights)
        if len(self.columns) > 2:
            raise ValueError(
                f"columns: {len(self.columns)} names; give one of text, or prompt and completion"
            )
        is_default = self.tokenizer_documents == PrepareOptions.tokenizer_documents
        if self.tokenizer is not None and not is_default:
            raise ValueError(
                "tokenizer_documents: no effect on a given tokenizer; leave out one of them"
            )
        for name in ("columns", "shuffle"):
            if getattr(self, name) and not self.input:
                raise ValueError(
                    f"{name}: no effect on the built-in corpus; give input=... as well"
                )

    @property
    def limit(self) -> int | None:
        """How many tokens to write at most; None reads inputs to their end."""
        return _CORPUS_TOKENS if self.tokens is None and not self.input else self.tokens


@dataclass(frozen=True, kw_only=True)
class PrepareProgress:
    """How far preparation is; `stage` is what runs now, `sources` are tokens by source."""

    stage: str
    tokens: int
    documents: int
    sources: Mapping[str, int]


def prepare_data(options: PrepareOptions) -> Path:
    """Turn text into a token shard; returns its folder. ValueError leaves an old shard alone."""
    for _ in prepare(options):
        pass
    return options.output


def prepare(options: PrepareOptions, corpus: Corpus | None = None) -> Iterator[PrepareProgress]:
    """Do the whole preparation, yielding progress; the shard exists only after the last record.

    corpus: what to read when the options name no input, or its categories beside the inputs.
    """
    require("options", options, PrepareOptions, "PrepareOptions(input=...)")
    out = options.output.resolve()
    restore(out)
    _check_out(options)
    sources = _get_sources(options, corpus)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial:
            yield PrepareProgress(stage="tokenizer", tokens=0, documents=0, sources={})
            tokenizer = _get_tokenizer(options, sources)
            tokenizer.save(partial)
            yield from _write_shard(options, sources, tokenizer, partial)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise ValueError(
            f"output: no room for a new {options.output} ({error.strerror}), the old one is as it "
            "was; make room or choose another disk"
        ) from error


def _get_sources(options: PrepareOptions, corpus: Corpus | None) -> list[Source]:
    weights = parse_weights(options.weights)
    if corpus is None:
        if not options.input:
            raise ValueError("input: missing; give files, folders or patterns of files")
        corpus = Corpus(categories=(), documents=lambda seed, weights: iter(()))
    sources = find_sources(options.input, weights, options.columns, corpus, options.seed)
    is_drawn = options.shuffle or any(source.name == BUILT_IN for source in sources)
    if options.seed and not is_drawn:
        raise ValueError("seed: no effect on inputs without shuffle=...; leave it out")
    return sources


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
    named = {"bos": options.bos_token, "eos": options.eos_token, "mask": options.mask_token}
    path = find_tokenizer(options.tokenizer)
    return open_tokenizer(path, {r: n for r, n in named.items() if n is not None})


def _num_characters(text: Text) -> int:
    return len(text[0]) + len(text[1])


def _write_shard(
    options: PrepareOptions, sources: Sequence[Source], tokenizer: Tokenizer, folder: Path
) -> Iterator[PrepareProgress]:
    dtype = choose_dtype(tokenizer.vocab_size)
    by_source = dict.fromkeys((source.name for source in sources), 0)
    with closing(ShardWriter(folder, dtype)) as writer:
        yield _get_progress(writer, by_source)
        for at, (ids, begin, context) in _mix_encoded(options, sources, tokenizer):
            writer.append(ids, begin, context)
            by_source[sources[at].name] += len(ids)
            if writer.num_documents % _BATCH == 0:
                yield _get_progress(writer, by_source)
            if options.limit is not None and writer.num_tokens >= options.limit:
                break
        else:
            _warn_of_end(options, sources, writer.num_tokens)
    yield _get_progress(writer, by_source)
    tokens_sha256, marks_sha256 = writer.checksums()
    ShardMeta(
        vocab_size=tokenizer.vocab_size,
        special=find_special_tokens(
            tokenizer, None if options.tokenizer is None else find_tokenizer(options.tokenizer)
        ),
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        dtype=dtype,
        tokens_sha256=tokens_sha256,
        marks_sha256=marks_sha256,
        tokenizer_sha256=tokenizer.fingerprint,
        sources=by_source,
        seed=options.seed,
        align=options.align,
    ).write(folder)


def _get_progress(writer: ShardWriter, by_source: Mapping[str, int]) -> PrepareProgress:
    tokens, documents, sources = writer.num_tokens, writer.num_documents, {**by_source}
    return PrepareProgress(stage="tokens", tokens=tokens, documents=documents, sources=sources)


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
    """Each (prompt, completion) as bos + prompt + completion + eos, as generation sees it.

    With `align`, more eos before and behind: prompt and completion each fill up a multiple.
    """
    assert tokenizer.eos_id is not None
    parts = tokenizer.encode_batch([part for text in texts for part in text])
    start, eos = tokenizer.encode_prompt(""), tokenizer.eos_id
    documents = []
    for prompt, completion in zip(parts[::2], parts[1::2], strict=True):
        context, ended = [*start, *prompt], [*completion, eos]
        before, after = -len(context) % align, -len(ended) % align
        ids = [*[eos] * before, *context, *ended, *[eos] * after]
        documents.append((ids, before, before + len(context)))
    return documents


def _check_out(options: PrepareOptions) -> None:
    out = options.output
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / META_FILE).is_file():
        raise ValueError(f"output: {out} exists and is not a token shard; choose another folder")
    if not options.overwrite:
        raise ValueError(
            f"output: {out} already holds a token shard; choose another folder or overwrite=True"
        )
