"""Checkpoint files into a model: built without memory, then filled tensor by tensor.

Decides what is missing, unexpected or damaged; what the names mean is `names`' business, where the
files are is `files`', how values get to their places is that of `fill` and `mapped`.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from twotower.checkpoint import names
from twotower.checkpoint.empty import Towers, allocate, build_empty
from twotower.checkpoint.files import (
    DTYPES,
    PACKED_DTYPES,
    Entry,
    generation_defaults,
    log_others,
    resolve,
)
from twotower.checkpoint.fill import Plan, Tally, fill
from twotower.checkpoint.layout import read_layout, with_heads
from twotower.checkpoint.mapped import of_both_towers, split_experts
from twotower.checkpoint.names import Slot
from twotower.checkpoint.quantize import read_scheme
from twotower.checkpoint.unread import FileMatrix, bytes_of_towers, half_dtypes, packed_later
from twotower.config import TwoTowerConfig
from twotower.families import read_config
from twotower.memory import lacking_room
from twotower.model.initialise import copy_context_to_denoiser
from twotower.model.precision import (
    ExpertStorage,
    Scheme,
    has_mapped_experts,
    map_experts,
    placement_refusal,
    scheme_of,
)
from twotower.model.two_tower import TwoTower

_LISTED = 8  # tensors that an error names
_log = logging.getLogger(__name__)


class TooLarge(ValueError):
    """Weights for which a device has no memory; nothing of them was read."""


def load_checkpoint(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    context_device: torch.device | str = "cpu",
    denoiser_device: torch.device | str = "cpu",
    towers: Towers = "both",
    expert_storage: ExpertStorage = "memory",
    keeps_halves: bool = False,
    packing: Scheme | None = None,
    show: Callable[[float], None] | None = None,
) -> TwoTower:
    """Load a checkpoint folder or hub id in eval mode; a single-tower backbone fills both towers.

    dtype None keeps each tower's own. keeps_halves: matrices that the files have in half precision
    keep that, for native passes. Routers stay float32, quantised weights as they are.
    expert_storage="mmap" leaves routed experts in the files, which must not change meanwhile.
    towers="denoiser" leaves the context tower without memory. packing: matrices that native passes
    will pack in so few bits stay in the files, which must not change until they have
    (`TwoTower.unread`). show: gets the share that has been read. ValueError (one line) for a
    damaged checkpoint, one of another model, or one that memory has no room for.
    """
    built: Towers = "both" if towers == "denoiser" else towers
    source = _open(resolve(path), built)
    if towers == "denoiser" and source.towers != "both":
        raise ValueError(f"{path}: has no denoiser tower of its own; use towers='both'")
    scheme = read_scheme(source.folder)
    devices = find_device(context_device), find_device(denoiser_device, "denoiser_device")
    named = [*map(str, devices)]
    if (misplaced := placement_refusal(scheme, expert_storage, named)) is not None:
        raise ValueError(f"{path}: {misplaced}")
    shape = build_empty(source.config, source.towers, scheme)
    plan, mapped = plan_tensors(source.folder, shape, source.entries), None
    target = _Target(_tower_dtypes(source.entries, dtype), devices, keeps_halves)
    if expert_storage == "mmap":
        plan, mapped = split_experts(shape, plan)
    elif expert_storage != "memory":
        raise ValueError(f"expert_storage={expert_storage!r} is unknown; use 'memory' or 'mmap'")
    model = build_empty(source.config, built, scheme)
    if mapped is not None:
        map_experts(model, mapped if source.towers == built else of_both_towers(mapped))
    _log.info("%s: towers=%s dtype=%s quant=%s", source.folder, towers, target.dtypes[0], scheme)
    parts = names.DENOISER_PARTS if built != towers else ""
    return _with_values(
        model, source, plan, target, parts, packing if source.towers == built else None, show
    )


def load_quantised(path: str | Path, scheme: Scheme, towers: Towers = "both") -> TwoTower:
    """Load a full-precision checkpoint with dtype None, each matrix quantised as it is read: peak
    memory is about the quantised size.

    ValueError (one line) if it is quantised already; ImportError without torchao.
    """
    source = _open(resolve(path), towers)
    if read_scheme(source.folder) is not None:
        raise ValueError(f"{path}: is quantised already; give the full-precision checkpoint")
    full = build_empty(source.config, source.towers)
    plan = plan_tensors(source.folder, full, source.entries)
    cpu = torch.device("cpu")
    target = _Target(_tower_dtypes(source.entries, None), (cpu, cpu))
    return _with_values(build_empty(source.config, towers, scheme), source, plan, target)


def has_denoiser(folder: Path) -> bool:
    """Whether a checkpoint folder holds a denoiser tower, by the names of its tensors."""
    _, layout = read_layout(folder, read_config(folder))
    return layout == names.TWO_TOWER


class _Source(NamedTuple):
    """A checkpoint whose headers were read; `towers` are those that its files can fill."""

    folder: Path
    config: TwoTowerConfig
    entries: dict[str, Entry]
    towers: Towers


class _Target(NamedTuple):
    """What the context tower and the denoiser tower are kept in, and where; keeps_halves: but for
    matrices that the files have in half precision.
    """

    dtypes: tuple[torch.dtype, torch.dtype]
    devices: tuple[torch.device, torch.device]
    keeps_halves: bool = False


def _open(folder: Path, towers: Towers) -> _Source:
    config = read_config(folder)
    entries, layout = read_layout(folder, config)
    log_others(folder, entries.values())
    if config.tie_word_embeddings:
        config, entries = with_heads(config, entries, towers)
    is_whole = towers == "both" and layout == names.TWO_TOWER
    return _Source(folder, config, entries, "both" if is_whole else "context")


@torch.no_grad()
def _with_values(
    model: TwoTower,
    source: _Source,
    plan: Plan,
    target: _Target,
    parts: str | tuple[str, ...] = "",
    packing: Scheme | None = None,
    show: Callable[[float], None] | None = None,
) -> TwoTower:
    """The empty model with memory and the values of its files, ready to decode.

    parts: how the names of what is wanted begin; the rest stays without memory. packing: matrices
    that it gives few bits stay in the files.
    """
    defaults = generation_defaults(source.folder)
    wanted = {name: found for name, found in plan.items() if name.startswith(parts)}
    left, tally = dict[str, FileMatrix](), Tally(wanted, show)
    if packing is not None:
        left = packed_later(wanted, packing, model.config.tie_word_embeddings, tally)
    own = half_dtypes(wanted) if target.keeps_halves else {}
    _require_room(model, source, wanted, target, packing, own)
    table = left.get("context_tower.embeddings.weight")
    if table is not None and model.config.tie_word_embeddings:
        left["context_lm_head.weight"] = table
    unread = {slot.parameter for _, slot in wanted.values() if slot.weight in left}
    allocate(model, target.dtypes, target.devices, parts, unread, own)
    fill(model, {n: found for n, found in wanted.items() if found[1].weight not in left}, tally)
    model.unread = left
    if source.towers == "context" and model.denoiser_tower is not None:
        copy_context_to_denoiser(model, seed=0)
    model.generation_defaults = defaults
    return model.eval()


def _require_room(
    model: TwoTower,
    source: _Source,
    plan: Plan,
    target: _Target,
    packing: Scheme | None,
    own: Mapping[str, torch.dtype],
) -> None:
    """TooLarge (one line) where the weights that a model is to hold do not fit into a device's
    memory: without it the system ends this process, or others, when they are filled.
    """
    is_twice = source.towers == "context" and model.denoiser_tower is not None  # in both towers
    scheme, is_tied = packing or scheme_of(model), model.config.tie_word_embeddings
    context, denoiser = bytes_of_towers(plan, target.dtypes, scheme, is_tied, own)
    by_device = Counter[torch.device]()
    by_device[target.devices[0]] += context
    by_device[target.devices[1]] += context if is_twice else denoiser
    for device, num_bytes in by_device.items():
        if (lack := lacking_room(device, num_bytes)) is not None:
            can_pack = scheme is None and device.type == "cpu" and not has_mapped_experts(model)
            few = "quantization=int8 or int4, " if can_pack else ""
            raise TooLarge(
                f"{source.folder}: needs {lack}; use {few}a smaller dtype, another device, or the "
                "context tower alone (mode=ar)"
            )


def plan_tensors(folder: Path, model: TwoTower, entries: Mapping[str, Entry]) -> Plan:
    """Which tensor goes where; one ValueError for all that are missing, unexpected or misshapen."""
    tensors = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
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
    packed = {n: slot.parameter for n, slot in slots.items() if n.endswith(".qdata")}
    other = [
        f"{n} ({e.dtype})"
        for n, (e, _) in plan.items()
        if n not in packed and e.dtype not in DTYPES
    ]
    unlike = [
        f"{n} ({plan[n][0].dtype})"
        for n, parameter in packed.items()
        if n in plan and PACKED_DTYPES.get(plan[n][0].dtype) != tensors[parameter].dtype
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems |= {f"not in {', '.join(DTYPES)}": other, "packed otherwise": unlike}
    _complain(folder, problems)
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
    entries: Mapping[str, Entry], dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """What the context tower and the denoiser tower are to be kept in."""
    if dtype is not None and dtype not in DTYPES.values():
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES.values())
        raise ValueError(f"dtype={dtype} is not supported; allowed are {allowed} or None")
    context = entries["context_tower.embeddings.weight"]
    denoiser = entries.get("denoiser_tower.embeddings.weight", context)
    return dtype or DTYPES[context.dtype], dtype or DTYPES[denoiser.dtype]


def find_device(name: torch.device | str, option: str = "device") -> torch.device:
    """The device that an option names; ValueError (one line) if this machine has none."""
    here = ["cpu:0"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        here += [f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count())]
    remedy = f"use {' or '.join(['cpu', *here[1:]])}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{option}={name!r} is unknown; {remedy}") from None
    if f"{device.type}:{device.index or 0}" not in here:
        raise ValueError(f"{option}={str(device)!r} is not on this machine; {remedy}")
    return device
