"""What a checkpoint is, from config.json and the headers of its files; no weight is read.

Counts come from the model itself, built without memory, so they cannot drift from the code.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from twotower.checkpoint import names
from twotower.checkpoint.denoiser import denoiser_config, find_denoiser
from twotower.checkpoint.empty import Towers, build_empty
from twotower.checkpoint.files import (
    ACCEPTED,
    DTYPES,
    PACKED_DTYPES,
    Entry,
    has_weights,
    log_others,
    resolve,
)
from twotower.checkpoint.gguf_reader import is_gguf
from twotower.checkpoint.layout import read_layout
from twotower.checkpoint.load import plan_tensors
from twotower.checkpoint.quantize import read_scheme
from twotower.config import TowerConfig, TwoTowerConfig
from twotower.families import PRESETS, config_from_dict, read_config
from twotower.model.precision import Scheme
from twotower.model.two_tower import TwoTower
from twotower.paths import usable_path
from twotower.specs import SPECS, AttentionSpec, MambaSpec, MoESpec

Tower = Literal["context", "denoiser"]
_FLOATS = {"float32": 4, "bfloat16": 2}  # bytes of a number; SSM states are always float32
KINDS = (
    "embeddings",
    "mamba",
    "attention",
    "moe routed",
    "moe shared",
    "moe router",
    "mlp",
    "norms",
    "head",
    "time conditioning",
)


@dataclass(frozen=True, kw_only=True)
class TowerRecord:
    """Parameters of one tower with its head; `active` are those that one token passes through."""

    parameters: dict[str, int]
    total: int
    active: int


@dataclass(frozen=True, kw_only=True)
class FilesRecord:
    """What the headers of the weight files say: bytes on disk, elements by dtype."""

    layout: str
    files: int
    num_bytes: int
    tensors: int
    elements_by_dtype: dict[str, int]
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class PrecisionRecord:
    """How a quantised checkpoint keeps its weights: `parameters` and `num_bytes`, with scales and
    zeros, by "4 bits", "8 bits" and others' dtype.
    """

    scheme: Scheme
    weights: dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class Description:
    """Architecture, parameters and memory of a checkpoint; memory in bytes.

    `weight_bytes` by precision: routers always float32; int8 and int4 as `convert` writes
    a bfloat16 checkpoint. `kv_bytes_per_token`, `state_bytes_per_row`: one row's context cache.
    """

    source: str
    config: TwoTowerConfig
    layers: dict[str, int]
    towers: dict[Tower, TowerRecord]
    total: int
    expert_share: float
    weight_bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    state_bytes_per_row: dict[str, int]
    files: FilesRecord | None
    precision: PrecisionRecord | None


def describe(
    path: str | Path, field: str = "model", denoiser: str | Path | None = None
) -> Description:
    """Describe a checkpoint folder, hub id, GGUF file, a model that is known by name, or a
    config.json alone (without files). denoiser: folder or hub id of a thin one, for both together.

    ValueError (one line), of the `field`, if there is no such checkpoint or a file is damaged.
    """

    def pair(config: TwoTowerConfig) -> TwoTowerConfig:
        if denoiser is None:
            return config
        return denoiser_config(config, find_denoiser(config, denoiser))

    file = usable_path(field, path)
    if str(path) in PRESETS and not file.exists():
        return describe_config(pair(config_from_dict(PRESETS[str(path)])), str(path))
    is_config = file.is_file() and not is_gguf(file)
    known = ", ".join((*PRESETS, ACCEPTED))
    folder = file if is_config else resolve(path, field=field, accepted=known)
    config, scheme = read_config(folder), read_scheme(folder)
    if is_config or not has_weights(folder):
        return describe_config(pair(config), str(folder))
    entries, layout = read_layout(folder, config)
    log_others(folder, entries.values())
    towers: Towers = "both" if layout == names.TWO_TOWER else "context"
    if config.tie_word_embeddings:
        entries = names.with_tied_heads(entries)
    files = _describe_files(folder, build_empty(config, towers, scheme), entries, layout)
    precision = None if scheme is None else _describe_precision(scheme, entries)
    model = build_empty(pair(config), towers if denoiser is None else "both")
    return _describe_model(model, str(folder), files, precision)


def describe_config(config: TwoTowerConfig, source: str) -> Description:
    """Describe the two-tower model of a configuration."""
    return _describe_model(build_empty(config, "both"), source, None)


def _describe_files(
    folder: Path, model: TwoTower, entries: dict[str, Entry], layout: str
) -> FilesRecord:
    problem = None
    try:
        plan_tensors(folder, model, entries)
    except ValueError as error:
        problem = str(error)
    elements: Counter[str] = Counter()
    for entry in entries.values():
        elements[entry.stored or entry.dtype] += torch.Size(entry.shape).numel()
    files = {entry.file for entry in entries.values()}
    return FilesRecord(
        layout=layout,
        files=len(files),
        num_bytes=sum(file.stat().st_size for file in files),
        tensors=len(entries),
        elements_by_dtype=dict(elements),
        problem=problem,
    )


def _describe_precision(scheme: Scheme, entries: dict[str, Entry]) -> PrecisionRecord:
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    bits = {names.split_part(n)[0]: e.dtype for n, e in entries.items() if n.endswith(".qdata")}
    for name, entry in entries.items():
        weight, part = names.split_part(name)
        kind = {"I8": "8 bits", "U8": "4 bits"}.get(bits.get(weight, ""), entry.dtype)
        elements = torch.Size(entry.shape).numel()
        sizes[kind] += elements * (DTYPES | PACKED_DTYPES)[entry.dtype].itemsize
        if part in ("", ".qdata"):
            parameters[kind] += elements * (2 if entry.dtype == "U8" else 1)
    return PrecisionRecord(
        scheme=scheme,
        weights={
            kind: {"parameters": parameters[kind], "num_bytes": sizes[kind]}
            for kind in sorted(sizes)
        },
    )


def _describe_model(
    model: TwoTower,
    source: str,
    files: FilesRecord | None,
    precision: PrecisionRecord | None = None,
) -> Description:
    config, context = model.config, model.config.context
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())  # tied heads count once
    sides: dict[Tower, dict[str, Tensor]] = {"context": {}, "denoiser": {}}
    for name, tensor in tensors.items():
        sides["context" if name.startswith(names.CONTEXT_PARTS) else "denoiser"][name] = tensor
    shapes: dict[Tower, TowerConfig] = {"context": context, "denoiser": config.denoiser}
    towers = {side: _count(part, shapes[side]) for side, part in sides.items() if part}
    total = sum(tower.total for tower in towers.values())
    in_experts = sum(
        count
        for tower in towers.values()
        for kind, count in tower.parameters.items()
        if kind.startswith("moe")
    )
    return Description(
        source=source,
        config=config,
        layers={kind.label: count for kind in SPECS if (count := len(context.layers_of(kind)))},
        towers=towers,
        total=total,
        expert_share=in_experts / total,
        weight_bytes=_weight_bytes(config, "both" if "denoiser" in towers else "context"),
        kv_bytes_per_token={d: size * context.kv_elements for d, size in _FLOATS.items()},
        state_bytes_per_row={
            d: size * context.conv_elements + 4 * context.ssm_elements
            for d, size in _FLOATS.items()
        },
        files=files,
        precision=precision,
    )


def _weight_bytes(config: TwoTowerConfig, towers: Towers) -> dict[str, int]:
    """Bytes of all weights by precision; quantised ones beside a bfloat16 rest."""
    sizes = {}
    for kind in ("float32", "bfloat16", "int8", "int4"):
        scheme = None if kind in _FLOATS else Scheme(weights=kind)  # type: ignore[arg-type]
        model = build_empty(config, towers, scheme)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        sizes[kind] = sum(
            tensor.numel()
            * (tensor.dtype.itemsize if names.keeps_dtype(name) else _FLOATS.get(kind, 2))
            for name, tensor in tensors.items()
        )
    return sizes


def _count(tensors: dict[str, Tensor], config: TowerConfig) -> TowerRecord:
    counts: Counter[str] = Counter()
    idle = 0
    for name, tensor in tensors.items():
        kind = _kind(name, config)
        counts[kind] += tensor.numel()
        if kind == "moe routed":
            moe = config.layers[int(name.split(".")[2])]
            assert isinstance(moe, MoESpec)
            idle += tensor.numel() * (moe.num_experts - moe.experts_per_token) // moe.num_experts
    total = counts.total()
    parameters = {kind: counts[kind] for kind in KINDS if counts[kind]}
    return TowerRecord(parameters=parameters, total=total, active=total - idle)


def _kind(name: str, config: TowerConfig) -> str:
    """Which of KINDS a tensor belongs to."""
    parts = name.split(".")
    if parts[0].endswith("lm_head") or parts[0] in ("bigram", "draft_ids"):
        return "head"
    if not parts[0].endswith("_tower"):
        return "time conditioning"
    if parts[1] != "layers":
        kinds = {"embeddings": "embeddings", "mask_embedding": "embeddings", "hidden_proj": "mlp"}
        return kinds.get(parts[1], "norms")
    if parts[3] == "norm":
        return "norms"
    layer = config.layers[int(parts[2])]
    if isinstance(layer, MoESpec):
        return {"experts": "moe routed", "gate": "moe router"}.get(parts[4], "moe shared")
    mixers: dict[type, str] = {MambaSpec: "mamba", AttentionSpec: "attention"}
    return mixers.get(type(layer), "mlp")
