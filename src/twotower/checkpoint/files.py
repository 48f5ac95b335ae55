"""Where a checkpoint's files are and what their headers say, without reading a weight."""

import logging
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower.checkpoint.gguf_reader import INDEX_FILE as GGUF_INDEX
from twotower.checkpoint.gguf_reader import (
    is_gguf,
    matrices,
    open_gguf,
    read_blocks,
    read_index,
    read_tensor,
)
from twotower.families import read_json
from twotower.kernels.quantised import BLOCK_TYPES, Blocks
from twotower.paths import usable_path

SHIPPED = "shipped"  # the name of the model inside the package
ACCEPTED = f"a checkpoint folder, a GGUF file, a hub id owner/name, or {SHIPPED}"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
# What other files of weights are called, by their endings in small letters.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz"}
_log = logging.getLogger(__name__)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HALVES = ("BF16", "F16")
PACKED_DTYPES = {"I8": torch.int8, "U8": torch.uint8}  # of quantised weights
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "*.model", "LICENSE*"]


class Entry(NamedTuple):
    """One tensor of a file under its name there; dtype in safetensors' spelling ("BF16").

    stored: how the file keeps it where that is not dtype ("Q4_1"); load: how it is read then;
    blocks: how it is read as it is.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str = ""
    load: Callable[[], Tensor] | None = None
    blocks: Callable[[], Blocks] | None = None

    def read(self) -> Tensor:
        """The tensor's values."""
        if self.load is not None:
            return self.load()
        with safe_open(self.file, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(self.name)
        return tensor


def resolve(
    path: str | Path, revision: str | None = None, field: str = "model", accepted: str = ACCEPTED
) -> Path:
    """The folder of a checkpoint: a local folder, a hub id "owner/name", which is downloaded, the
    one that stands for a GGUF file, or "shipped". revision: branch, tag or commit of a hub id.

    ValueError (one line) if there is neither, of the `field` and what it accepts.
    """
    folder = usable_path(field, path)
    if folder.is_dir():
        return folder
    if is_gguf(folder):
        return open_gguf(folder)
    if folder.exists():
        raise ValueError(f"{field}: {path} is a file of another kind; give {accepted}")
    replaced = usable_path(field, set_aside(folder))
    if replaced.is_dir():  # a save was killed between its two renames
        return replaced
    if str(path) == SHIPPED:
        return shipped_folder()
    if _HUB_ID.fullmatch(str(path)) and folder.suffix.lower() != ".gguf":
        return _download(str(path), revision)
    raise ValueError(f"{field}: {path} is not a file or folder; give {accepted}")


def find_tokenizer(path: str | Path) -> Path:
    """The file or folder of the tokenizer of whatever `resolve` takes, or of a tokenizer.json."""
    file = usable_path("tokenizer", path)
    if file.is_file() and file.suffix.lower() == ".json":
        return file
    return resolve(path, field="tokenizer", accepted=f"a tokenizer.json, {ACCEPTED}")


def shipped_folder() -> Path:
    """Folder of the model inside the package; ValueError (one line) if there is none."""
    folder = Path(str(resources.files("twotower") / "assets"))
    if not (folder / "config.json").is_file():
        raise ValueError("model: this installation has none inside; give a path or hub id")
    return folder


def set_aside(folder: Path) -> Path:
    """Where a checkpoint waits for the moment in which a new one takes its place."""
    return folder.parent / f".{folder.name}.old"


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = textwrap.shorten(str(error), 160, placeholder=" ...")
        raise ValueError(
            f"{hub_id}: no such folder here, and the hub did not give it "
            f"({type(error).__name__}: {reason}); give a folder or connect to the network"
        ) from None


def has_weights(folder: Path) -> bool:
    """Whether a folder holds more than a configuration."""
    return any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE, GGUF_INDEX))


def has_quantised_blocks(folder: Path) -> bool:
    """Whether a folder stands for a GGUF file with matrices of a quantised type."""
    if not (folder / GGUF_INDEX).is_file():
        return False
    return any(entry["type"] in BLOCK_TYPES for entry in read_index(folder)[1].values())


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder from its files' headers, by the name in the file.

    ValueError (one line) for damage, and where two of them could be the weights.
    """
    found = [name for name in (GGUF_INDEX, SINGLE_FILE, INDEX_FILE) if (folder / name).is_file()]
    if not found:
        remedy = "add the weights"
        if others := _weights_beside(folder, set()):
            is_shards = ".safetensors" in others
            wanted = f"restore {INDEX_FILE}" if is_shards else "save the model as safetensors"
            remedy = f"{others} not read: {wanted}"
        raise ValueError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; {remedy}")
    if len(found) > 1:
        weight_map = _weight_map(folder / INDEX_FILE) if INDEX_FILE in found else {}
        if GGUF_INDEX in found or set(weight_map.values()) != {SINGLE_FILE}:
            raise ValueError(
                f"{folder}: holds {found[0]} and {found[1]}, of which either could be the model; "
                "remove the one that is not"
            )
    if GGUF_INDEX in found:
        file, tensors = read_index(folder)
        each = [matrices(name, entry) for name, entry in tensors.items()]
        return {n: _gguf_entry(file, n, one) for found in each for n, one in found.items()}
    if SINGLE_FILE in found:
        return _header(folder / SINGLE_FILE)
    weight_map = _weight_map(folder / INDEX_FILE)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        held = _header(folder / shard)
        entries |= {name: e for name, e in held.items() if weight_map.get(name, shard) == shard}
    if stray := next((name for name in weight_map if name not in entries), None):
        raise ValueError(
            f"{folder / INDEX_FILE}: {weight_map[stray]} does not hold {stray}; restore the index "
            "and the shards of one save"
        )
    return entries


def log_others(folder: Path, entries: Collection[Entry]) -> None:
    """One warning that names the files of weights beside those that the entries come from."""
    used = {entry.file.resolve() for entry in entries}
    if others := _weights_beside(folder, used):
        names = ", ".join(sorted(file.name for file in used)[:4])
        _log.warning("%s: %s not read; the weights are %s", folder, others, names)


def _weights_beside(folder: Path, used: set[Path]) -> str:
    """The files of weights in a folder but for those, by their names."""
    others = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix.lower() in WEIGHTS and file.resolve() not in used and file.is_file()
    )
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    return ", ".join(others[:4]) + more


def _gguf_entry(file: Path, name: str, entry: Mapping[str, Any]) -> Entry:
    """Quantised values are float32 as soon as they are read."""
    kind = entry["type"]
    dtype, shape = kind if kind in DTYPES else "F32", tuple(entry["shape"])
    is_packed = kind in BLOCK_TYPES and len(shape) == 2
    blocks = partial(read_blocks, file, entry) if is_packed else None
    return Entry(file, name, shape, dtype, kind, partial(read_tensor, file, entry), blocks)


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map; restore the file")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: {shard!r} is not a file name; restore the file")
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index}: names {shard}, which is missing; restore the shard")
    return weight_map


def _header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt") as shard:
            views = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {
                n: Entry(file, n, tuple(v.get_shape()), v.get_dtype()) for n, v in views.items()
            }
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file}: truncated or not a safetensors file ({reason}); fetch it again"
        ) from None


def generation_defaults(path: str | Path) -> dict[str, object]:
    """A checkpoint's own defaults, {} without generation_config.json; ValueError for damage."""
    file = resolve(path) / GENERATION_FILE
    return read_json(file) if file.exists() else {}
