"""Which texts a shard is made of: inputs, a generated corpus, and their mixture.

Decides that a weight is a share of tokens: documents differ in length by orders of magnitude, so a
share of documents says little about what a model reads.
The next document comes from the source that is furthest behind its share. That is exact to one
document, and needs no random numbers.
"""

import glob
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

from twotower.train.readers import Text, has_columns, is_document_file, read_file, stem_of

BUILT_IN = "built-in corpus"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents that a program writes, without end, by a seed and weights of these `categories`."""

    categories: Collection[str]
    documents: Callable[[int, Mapping[str, float]], Iterator[Text]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named stream of documents; `texts` starts it anew. `weight` is relative."""

    name: str
    weight: float
    texts: Callable[[], Iterator[Text]]


def find_sources(
    inputs: Sequence[Path],
    weights: Mapping[str, float],
    columns: Sequence[str],
    corpus: Corpus,
    seed: int,
) -> list[Source]:
    """The sources of a shard; ValueError for what is not there or has no weight.

    Without inputs it is the corpus alone, whose weights are by category. Beside inputs, the
    categories that weights name are one source more. Inputs without weights are spread by size.
    """
    if not inputs:
        return [_generated(corpus, seed, weights, 1.0)]
    names = _names(inputs, corpus.categories)
    files = {name: find_files(path) for name, path in zip(names, inputs, strict=True)}
    written = dict(zip(map(str, inputs), names, strict=True))
    by_input, by_category = _split_weights(weights, written, corpus.categories)
    if columns and not any(has_columns(file) for found in files.values() for file in found):
        raise ValueError(f"columns: no effect on {', '.join(names)}: plain text has no columns")
    if not weights:
        by_input = {name: sum(file.stat().st_size for file in files[name]) for name in names}
    sources = [
        Source(name=name, weight=by_input[name], texts=partial(_read, files[name], columns))
        for name in names
    ]
    total = sum(by_category.values())
    return [*sources, _generated(corpus, seed, by_category, total)] if by_category else sources


def find_files(path: Path) -> list[Path]:
    """The files of one input in sorted order: a file, a folder's documents, or a pattern's."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file())
        files = sorted(file for file in inside if is_document_file(file.relative_to(path)))
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
        files = sorted(file for file in found if file.is_file())
    if not files:
        kind = "no .jsonl, .parquet or .txt in folder" if path.is_dir() else "no file or folder"
        raise ValueError(f"input: {kind} {path}; give files, folders or patterns of files")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"input: {file} is empty; fill it or leave it out")
    return files


def parse_weights(pairs: Sequence[str]) -> dict[str, float]:
    """Weights by name from NAME=NUMBER pairs; ValueError for other text or a name given twice."""
    weights: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not 0 <= weight < math.inf:
            raise ValueError(
                f"weights: {pair!r} is not NAME=NUMBER with a number of 0 or more, as in math=2"
            )
        if name in weights:
            raise ValueError(f"weights: {name!r} is given twice; leave one out")
        weights[name] = weight
    return weights


def shuffle(texts: Iterator[T], size: int, seed: str) -> Iterator[T]:
    """All of `texts`, each drawn at random from the next `size` that are waiting."""
    rng = Random(seed)
    waiting: list[T] = []
    for text in texts:
        if len(waiting) < size:
            waiting.append(text)
            continue
        at = rng.randrange(size)
        yield waiting[at]
        waiting[at] = text
    rng.shuffle(waiting)
    yield from waiting


def mix(
    streams: Sequence[Iterator[T]],
    weights: Sequence[float],
    length: Callable[[T], int],
    is_strict: bool,
) -> Iterator[tuple[int, T]]:
    """(index of its stream, item): always from the stream that is furthest behind its share.

    `is_strict` stops when one ends, so that shares hold and nothing repeats; else the rest goes on.
    """
    taken = [0] * len(streams)
    going = [at for at, weight in enumerate(weights) if weight > 0]
    while going:
        at = min(going, key=lambda i: (taken[i] / weights[i], i))
        item = next(streams[at], None)
        if item is not None:
            taken[at] += length(item)
            yield at, item
        elif is_strict:
            return
        else:
            going.remove(at)


def _generated(corpus: Corpus, seed: int, weights: Mapping[str, float], weight: float) -> Source:
    corpus.documents(seed, weights)  # an error of the weights shows before any work
    texts = partial(corpus.documents, seed, weights)
    return Source(name=BUILT_IN, weight=weight, texts=texts)


def _read(files: Sequence[Path], columns: Sequence[str]) -> Iterator[Text]:
    for file in files:
        yield from read_file(file, columns if has_columns(file) else ())


def _names(inputs: Sequence[Path], categories: Collection[str]) -> list[str]:
    """Short names of the inputs; as they were given where a short one would be ambiguous."""
    written = list(map(str, inputs))
    twice = next((name for name, count in Counter(written).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"input: {twice} is given twice; leave one out")
    short = [path.name if path.is_dir() else stem_of(path) for path in inputs]
    taken = Counter([*short, *categories, "", BUILT_IN])
    return [
        name if taken[name] == 1 and not set(name) & set("*?[") else given
        for name, given in zip(short, written, strict=True)
    ]


def _split_weights(
    weights: Mapping[str, float], names: Mapping[str, str], categories: Collection[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Weights of inputs and of categories; `names` are the inputs' names by how they were given."""
    by_input: dict[str, float] = {}
    by_category: dict[str, float] = {}
    for key, weight in weights.items():
        name = names.get(key, key)
        if name in names.values():
            if weight == 0:
                raise ValueError(
                    f"weights: {key}=0 gives the input no share; leave it out of the inputs"
                )
            by_input[name] = weight
        elif key in categories:
            by_category[key] = weight
        else:
            known = ", ".join([*names.values(), *categories])
            raise ValueError(f"weights: {key!r} is neither input nor category; use some of {known}")
    missing = [name for name in names.values() if name not in by_input]
    if weights and missing:
        raise ValueError(f"weights: {missing[0]} has none; give {missing[0]}=NUMBER as well")
    return by_input, by_category
