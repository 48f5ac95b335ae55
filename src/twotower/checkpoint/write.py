"""Tensors and configuration onto the disk, whole or not at all.

Everything is written into a sibling folder, which then takes the old one's place: a full disk or a
kill leaves the old checkpoint whole. Files beside the weights in the old folder are kept.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.arguments import COUNT, check
from twotower.checkpoint.files import DTYPES, INDEX_FILE, PACKED_DTYPES, SINGLE_FILE, set_aside
from twotower.checkpoint.gguf_reader import INDEX_FILE as GGUF_INDEX
from twotower.file_lock import only_writer
from twotower.paths import usable_path

MAX_SHARD_BYTES = 5_000_000_000
_IDS_DTYPES = {"I32": torch.int32, "I64": torch.int64}  # of token ids
_SPELLING = {d: name for name, d in {**DTYPES, **PACKED_DTYPES, **_IDS_DTYPES}.items()}


class Piece(NamedTuple):
    """One tensor to write; the values stay where they are until their turn."""

    name: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.tensor.numel() * self.dtype.itemsize


def write_checkpoint(
    path: str | Path,
    pieces: list[Piece],
    config: Mapping[str, object],
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights, config.json and extra files aside, then put them in the old folder's place."""
    folder = usable_path("folder", path).resolve()
    extra = {**(extra_files or {}), "config.json": _json(config)}
    _check(folder, pieces, extra, max_shard_bytes)
    try:
        with only_writer(folder), replacing(folder) as aside:
            _write_weights(aside, pieces, max_shard_bytes)
            for name, content in extra.items():
                _write(aside / name, [content])
            _keep_others(folder, aside)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be saved ({error.strerror or error}); what was there is unchanged; "
            "free some space or choose another place"
        ) from None


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside it, which takes its place in the end, or is gone."""
    restore(folder)
    aside = folder.parent / f".{folder.name}.new"
    shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
    aside.mkdir()
    try:
        yield aside
        _swap(folder, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(
    folder: Path, pieces: list[Piece], extra: Mapping[str, bytes], max_shard_bytes: int
) -> None:
    check({"max_shard_bytes": max_shard_bytes}, {"max_shard_bytes": COUNT})
    for name in extra:
        if Path(name).name != name or _is_of_weights(name):
            raise ValueError(f"extra_files: {name!r} must be a plain file name, not of weights")
    for piece in pieces:
        # Whole numbers are written where they are given; nothing is cut down to them here.
        is_cut = not piece.dtype.is_floating_point and piece.dtype != piece.tensor.dtype
        if piece.dtype not in _SPELLING or is_cut:
            allowed = list(DTYPES.values())
            raise ValueError(f"dtype={piece.dtype} cannot be saved; use one of {allowed}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another place")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder}: is not empty and not a checkpoint; choose another folder")


def _json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_weights(folder: Path, pieces: list[Piece], max_shard_bytes: int) -> None:
    shards = _split(pieces, max_shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / SINGLE_FILE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard)
        weight_map |= {piece.name: file for piece in shard}
    total = sum(piece.num_bytes for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write(folder / INDEX_FILE, [_json(index)])


def _split(pieces: list[Piece], max_shard_bytes: int) -> list[list[Piece]]:
    """Consecutive groups of at most `max_shard_bytes`, or of one tensor that is larger."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.num_bytes
    return shards


def write_tensors(file: Path, pieces: list[Piece]) -> None:
    """Write and sync a safetensors file, one tensor in memory; the library's writer wants all."""
    pieces = sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.name))  # aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": _SPELLING[piece.dtype],
            "shape": list(piece.tensor.shape),
            "data_offsets": [offset, offset + piece.num_bytes],
        }
        offset += piece.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write(file, _chunks(len(text).to_bytes(8, "little") + text, pieces))


def _chunks(start: bytes, pieces: list[Piece]) -> Iterator[bytes | memoryview]:
    yield start
    for piece in pieces:
        flat = piece.tensor.detach().to("cpu", piece.dtype).contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data


def _write(file: Path, chunks: Iterable[bytes | memoryview]) -> None:
    with file.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def _keep_others(old: Path, new: Path) -> None:
    """Carry over what is neither weights nor written anew: tokenizer, model card, notes."""
    for item in old.iterdir() if old.is_dir() else ():
        if _is_of_weights(item.name) or (new / item.name).exists():
            continue
        if item.is_dir():
            shutil.copytree(item, new / item.name, symlinks=True)
        else:
            shutil.copy2(item, new / item.name, follow_symlinks=False)


def _is_of_weights(name: str) -> bool:
    """Whether a file of that name would be taken for this checkpoint's weights."""
    return name.lower().endswith(".safetensors") or name in (INDEX_FILE, GGUF_INDEX)


def restore(folder: Path) -> None:
    """Undo the first of the two renames of a save that was killed between them."""
    if set_aside(folder).is_dir() and not folder.exists():
        set_aside(folder).rename(folder)


def _swap(folder: Path, new: Path) -> None:
    old = set_aside(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        restore(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
