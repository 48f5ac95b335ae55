"""GGUF files as a source of models: opened once, their metadata becomes a folder like any other.

The folder, in the user's cache, holds config.json, tokenizer and chat template, and an index of
the tensors; the weights stay in the GGUF file and are made full precision as they are read.
"""

import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoint.gguf_tokenizer import (
    as_json,
    ends_by_name,
    tokenizer_files,
    with_defaults,
)
from twotower.config import TwoTowerConfig
from twotower.families import FAMILIES, Family, config_from_dict, family_of, read_json
from twotower.kernels.quantised import BLOCK_TYPES, Blocks
from twotower.specs import MAX_EXPERTS

if TYPE_CHECKING:
    from gguf import GGUFReader

INDEX_FILE = "gguf_tensors.json"
_CACHE = Path.home() / ".cache" / "twotower" / "gguf"
_VERSION = 4  # of what is written there
_MAGIC = b"GGUF"
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = (*_PLAIN, *BLOCK_TYPES)
_MAX_TENSORS, _MAX_FIELDS = 1 << 15, 1 << 12
_MAX_READS = 3 << 20  # more than those of the largest vocabulary that is published
_NOT_WEIGHTS = ("rope_freqs.weight",)  # what config.json says in another way


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name or its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return path.suffix.lower() == ".gguf" or stream.read(4) == _MAGIC


def open_gguf(file: Path) -> Path:
    """The folder that stands for a GGUF file; made on the first call for this version of the file.

    ValueError (one line) for a file that is damaged, of another architecture, or has tensors of an
    unsupported type; nothing is left behind then.
    """
    file = file.resolve()
    state = file.stat()
    key = f"{_VERSION} {file} {state.st_size} {state.st_mtime_ns}"
    folder = _CACHE / f"{file.stem[:40]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (folder / INDEX_FILE).is_file():
        return folder
    contents = _contents(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as aside:
        made = Path(aside) / "made"
        made.mkdir()
        for name, content in contents.items():
            (made / name).write_bytes(content)
        try:
            os.replace(made, folder)  # whole or not there, also beside another process
        except OSError:
            shutil.rmtree(made)  # the other process was first
    return folder


def read_index(folder: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The GGUF file behind a folder, and its tensors by their name there: type, shape, offset."""
    if folder.resolve().parent != _CACHE.resolve():
        raise ValueError(
            f"{folder / INDEX_FILE}: is not an index that was made here; name the GGUF file itself"
        )
    values = read_json(folder / INDEX_FILE)
    file, tensors = Path(str(values["file"])), values["tensors"]
    assert isinstance(tensors, dict)  # written by open_gguf
    if not file.is_file():
        raise ValueError(f"{file}: has gone; put the GGUF file back or name another one")
    return file, tensors


def read_tensor(file: Path, entry: Mapping[str, Any]) -> Tensor:
    """A tensor's values in full precision: float32, or the file's own float type."""
    from gguf import GGMLQuantizationType, quants

    data, kind, shape = _bytes_of(file, entry), entry["type"], tuple(entry["shape"])
    if kind in _PLAIN:
        return torch.from_numpy(np.array(data)).view(_PLAIN[kind]).view(shape)
    rows = data.reshape(*shape[:-1], -1)
    return torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[kind])).view(shape)


def read_blocks(file: Path, entry: Mapping[str, Any]) -> Blocks:
    """A matrix of a quantised type as it is in the file."""
    data, (rows, width) = np.array(_bytes_of(file, entry)), entry["shape"]
    return Blocks(torch.from_numpy(data.reshape(rows, -1)), entry["type"], width)


def _bytes_of(file: Path, entry: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    size = (entry["num_bytes"],)
    return np.memmap(file, mode="r", dtype=np.uint8, offset=entry["offset"], shape=size)


def matrices(name: str, entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A tensor's matrices as tensors of their own: those of a stack one by one, NAME[0] the first.

    So experts are read, made full precision and quantised one at a time.
    """
    count = entry["shape"][0] if len(entry["shape"]) == 3 else 0
    if not 1 <= count <= MAX_EXPERTS:
        return {name: dict(entry)}
    size = entry["num_bytes"] // count
    one = {"type": entry["type"], "shape": entry["shape"][1:], "num_bytes": size}
    return {f"{name}[{i}]": one | {"offset": entry["offset"] + i * size} for i in range(count)}


def gguf_names(config: TwoTowerConfig) -> Callable[[str], str | None]:
    """From our name of a tensor inside a tower to its name in a GGUF file, None if it has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    family = family_of(config)
    ids = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    arch = ids[family.gguf_architecture(config)]
    table = get_tensor_name_map(arch, config.context.num_layers)

    def find(name: str) -> str | None:
        known = family.gguf_lookup_name(name)
        found: str | None = table.get_name(known, try_suffixes=(".weight", ".bias"))
        return found

    return find


def _contents(file: Path) -> dict[str, bytes]:
    """The files of the folder that stands for a GGUF file."""
    reader = _open(file)
    try:
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library raises what numpy does
        raise _damaged(file, error) from None
    try:
        family = _family(metadata)
        tensors = dict(_tensors(file, reader))
        prefix = f"{metadata['general.architecture']}."
        metadata = with_defaults({n.removeprefix(prefix): v for n, v in metadata.items()})
        names = frozenset(tensors)
        factors = _values_of(file, tensors.get("rope_freqs.weight"))
        values = {"model_type": family.MODEL_TYPE} | family.config_from_gguf(
            metadata, names, factors
        )
        ends = values["eos_token_id"]
        assert isinstance(ends, list)
        values["eos_token_id"] = list(dict.fromkeys([*ends, *ends_by_name(metadata)]))
        config_from_dict(values)
        files = tokenizer_files(metadata)
    except KeyError as error:
        raise ValueError(f"{file}: lacks the metadata {error}; fetch the file again") from None
    except (IndexError, TypeError, AttributeError) as error:  # a value of another kind, or length
        raise _damaged(file, error) from None
    except ValueError as error:
        text = str(error).removeprefix("config.json: ")
        raise ValueError(f"{file}: {text}") from None
    drafts = range(int(str(values["num_hidden_layers"])), metadata["block_count"])
    left = {n: t for n, t in tensors.items() if n not in _NOT_WEIGHTS and _block(n) not in drafts}
    index = {"file": str(file), "tensors": left}
    return {"config.json": as_json(values), **files, INDEX_FILE: as_json(index)}


def _open(file: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            f"{file}: reading GGUF needs the package gguf; install it with: pip install '.[bench]'"
        ) from None

    class Bounded(GGUFReader):
        """The library believes a file's counts, and goes on for ever behind the file's end."""

        num_reads = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            self.num_reads += 1
            if self.num_reads > _MAX_READS:
                raise ValueError(f"its header has more than {_MAX_READS:,} values")
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends before its data does")
            return super()._get(offset, dtype, count, override_order)

    with file.open("rb") as stream:
        header = stream.read(24)
    order: Literal["little", "big"] = "big" if header[4:6] == bytes(2) else "little"
    for begin, most, what in ((8, _MAX_TENSORS, "tensors"), (16, _MAX_FIELDS, "fields")):
        if int.from_bytes(header[begin : begin + 8], order) > most:
            raise _damaged(file, ValueError(f"it has more than {most:,} {what}"))
    try:
        return Bounded(file)
    except Exception as error:  # a truncated header ends in one of numpy's errors
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:120]
    return ValueError(f"{file}: truncated or not a GGUF file ({reason}); fetch it again")


def _family(metadata: Mapping[str, Any]) -> Family:
    """The family of the file's architecture; ValueError (one line) for others and for parts."""
    if metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"is one of {metadata['split.count']} parts; merge them with llama-gguf-split"
        )
    architecture = metadata.get("general.architecture")
    known = {name: family for family in FAMILIES.values() for name in family.GGUF_READS}
    if architecture not in known:
        raise ValueError(
            f"architecture {architecture!r} is not supported; read from GGUF are {', '.join(known)}"
        )
    return known[architecture]


def _tensors(file: Path, reader: "GGUFReader") -> Iterator[tuple[str, dict[str, Any]]]:
    size = file.stat().st_size
    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type.name, [int(n) for n in reversed(tensor.shape)]
        if not tensor.name.isprintable():
            raise ValueError(f"has a tensor of the name {tensor.name!r}; fetch the file again")
        if kind not in TYPES:
            raise ValueError(
                f"{tensor.name} is of type {kind}, which is not supported; supported are "
                f"{', '.join(TYPES)}"
            )
        offset, num_bytes = int(tensor.data_offset), int(tensor.n_bytes)
        if offset + num_bytes > size:
            raise ValueError(f"ends before {tensor.name} does: truncated; fetch the file again")
        yield (
            tensor.name,
            {"type": kind, "shape": shape, "offset": offset, "num_bytes": num_bytes},
        )


def _block(name: str) -> int | None:
    """The number of the block that a tensor belongs to."""
    match = re.match(r"blk\.(\d+)\.", name)
    return None if match is None else int(match[1])


def _values_of(file: Path, entry: Mapping[str, Any] | None) -> list[float] | None:
    if entry is None:
        return None
    if math.prod(entry["shape"]) > 2**16:
        raise ValueError("rope_freqs.weight is larger than any head; fetch the file again")
    return [float(value) for value in read_tensor(file, entry).float()]
