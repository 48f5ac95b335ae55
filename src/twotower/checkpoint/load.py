"""Checkpoint files into a model: built without memory, then filled tensor by tensor.

Peak memory is the model plus a portion of one file. Decides what is missing, unexpected or
damaged; what the names mean is `names`' business, where the files are is `files`'.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint import names
from twotower.checkpoint.empty import Towers, allocate, build_empty
from twotower.checkpoint.files import DTYPES, Entry, generation_defaults, read_entries, resolve
from twotower.checkpoint.names import Layout, Slot
from twotower.config import ModelConfig
from twotower.model.initialise import copy_context_to_denoiser
from twotower.model.two_tower import TwoTower

_LISTED = 8  # tensors that an error names
_PORTION = 2**25  # elements read from a file before it is opened anew
_log = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    denoiser_dtype: torch.dtype | None = None,
    context_device: torch.device | str = "cpu",
    denoiser_device: torch.device | str = "cpu",
    towers: Towers = "both",
) -> TwoTower:
    """Load a checkpoint folder or hub id in eval mode; a single-tower backbone fills both towers.

    dtype None keeps each tower's own; denoiser_dtype None means `dtype`. Routers stay float32.
    ValueError (one line) for a damaged checkpoint, or one of another model.
    """
    folder = resolve(path)
    config, defaults = ModelConfig.from_file(folder), generation_defaults(folder)
    entries, layout = read_layout(folder)
    if config.tie_word_embeddings:
        config, entries = _with_heads(config, entries, towers)
    model = build_empty(config, "both" if towers == "both" and layout == "two-tower" else "context")
    plan = plan_tensors(folder, model, entries)
    dtypes = _tower_dtypes(entries, dtype, denoiser_dtype)
    devices = (_device(context_device), _device(denoiser_device))
    with torch.no_grad():
        if towers == "both" and layout != "two-tower":
            model = build_empty(config, "both")
        allocate(model, dtypes, devices)
        _fill(model, plan)
        if towers == "both" and layout != "two-tower":
            copy_context_to_denoiser(model, seed=0)
    model.generation_defaults = defaults
    _log.info("%s: layout=%s towers=%s dtype=%s", folder, layout, towers, dtypes[0])
    return model.eval()


def read_layout(folder: Path) -> tuple[dict[str, Entry], Layout]:
    """The tensors under their two-tower names, and the layout they were found in."""
    found = read_entries(folder)
    layout = names.layout_of(found)
    if layout is None:
        raise ValueError(
            f"{folder}: tensors such as {next(iter(found), 'none')!r} are of another model; "
            "known are context_tower.*, backbone.* and model.*"
        )
    entries: dict[str, Entry] = {}
    for name, entry in found.items():
        if (released := names.released_name(name, layout)) is not None:
            entries[released] = entry._replace(name=name)
    return entries, layout


Plan = dict[str, tuple[Entry, Slot]]


def plan_tensors(folder: Path, model: TwoTower, entries: Mapping[str, Entry]) -> Plan:
    """Which tensor goes where; one ValueError for all that are missing, unexpected or misshapen."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    slots = names.released_slots(shapes)
    for name in [name for name in shapes if names.is_stacked(name) and name in entries]:
        slots = {n: slot for n, slot in slots.items() if slot.parameter != name}
        slots[name] = Slot(name, None, shapes[name])
    missing = [name for name in slots if name not in entries]
    skipped = names.DENOISER_PARTS if model.denoiser_tower is None else ()
    unexpected = [n for n in entries if n not in slots and not n.startswith(skipped)]
    plan = {n: (entries[n], slot) for n, slot in slots.items() if n in entries}
    misshapen = [
        f"{name} {list(entry.shape)} instead of {list(slot.shape)}"
        for name, (entry, slot) in plan.items()
        if entry.shape != slot.shape
    ]
    other = [f"{n} ({entry.dtype})" for n, (entry, _) in plan.items() if entry.dtype not in DTYPES]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    _complain(folder, {**problems, f"not in {', '.join(DTYPES)}": other})
    return plan


def _complain(folder: Path, problems: Mapping[str, list[str]]) -> None:
    parts = []
    for kind, found in problems.items():
        if found:
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            parts.append(f"{len(found)} {kind}: {', '.join(found[:_LISTED])}{more}")
    if parts:
        raise ValueError(
            f"{folder}: the tensors do not fit config.json: {'; '.join(parts)}; "
            "use the config.json that belongs to these weights"
        )


def _tower_dtypes(
    entries: Mapping[str, Entry], dtype: torch.dtype | None, denoiser_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """What the context tower and the denoiser tower are to be kept in."""
    for name, wanted in (("dtype", dtype), ("denoiser_dtype", denoiser_dtype)):
        if wanted is not None and wanted not in DTYPES.values():
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES.values())
            raise ValueError(f"{name}={wanted} is not supported; allowed are {allowed} or None")
    context = entries["context_tower.embeddings.weight"]
    denoiser = entries.get("denoiser_tower.embeddings.weight", context)
    return dtype or DTYPES[context.dtype], denoiser_dtype or dtype or DTYPES[denoiser.dtype]


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is unknown; use 'cpu', 'cuda' or 'cuda:1'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r} is not on this machine, which has {torch.cuda.device_count()} "
            "CUDA devices; use 'cpu'"
        )
    return device


def _fill(model: TwoTower, plan: Plan) -> None:
    """Copy every tensor to its place, shard by shard, and check that it is finite there."""
    targets = model.state_dict()
    for name, source, slot in _stream(plan):
        target = targets[slot.parameter]
        target = target if slot.expert is None else target[slot.expert]
        target.copy_(source)
        low, high = torch.aminmax(target)  # one pass, no temporaries; NaN wins in both
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            entry = plan[name][0]
            raise ValueError(
                f"{entry.file}: {entry.name} holds NaN or infinite values as {target.dtype}; "
                "fetch or train the checkpoint again"
            )


def _stream(plan: Plan) -> Iterator[tuple[str, Tensor, Slot]]:
    """Tensors in the order of the shards. Pages that were read stay in memory while a file is open,
    so it is opened anew for every portion.
    """
    for file, group in _portions(plan):
        with safe_open(file, framework="pt") as shard:
            for name in group:
                entry, slot = plan[name]
                yield name, shard.get_tensor(entry.name), slot


def _portions(plan: Plan) -> Iterator[tuple[Path, list[str]]]:
    """Names of one file each, of about `_PORTION` elements."""
    by_file = sorted(plan, key=lambda name: str(plan[name][0].file))
    for file, group in groupby(by_file, key=lambda name: plan[name][0].file):
        portion: list[str] = []
        size = 0
        for name in group:
            portion.append(name)
            size += math.prod(plan[name][0].shape)
            if size >= _PORTION:
                yield file, portion
                portion, size = [], 0
        yield file, portion


def _with_heads(
    config: ModelConfig, entries: dict[str, Entry], towers: Towers
) -> tuple[ModelConfig, dict[str, Entry]]:
    """Complete a tied checkpoint's heads; untied if one has values of its own.

    `transformers` writes such heads: it never ties this architecture, whatever its config says.
    """
    entries = names.with_tied_heads(entries)
    for head, source in names.HEADS.items():
        needed = towers == "both" or head.startswith(names.CONTEXT_PARTS)
        if not needed or head not in entries or source not in entries:
            continue
        a, b = _read(entries[head]), _read(entries[source])
        if a.shape != b.shape or not torch.equal(a, b):
            _log.warning("config.json ties the head, but %s has values of its own: kept", head)
            return dataclasses.replace(config, tie_word_embeddings=False), entries
    return config, entries


def _read(entry: Entry) -> Tensor:
    with safe_open(entry.file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(entry.name)
    return tensor
