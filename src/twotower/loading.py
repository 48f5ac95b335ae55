"""A model by its name, ready to decode: where it lies, on which devices, in which precision, and
what runs its passes.
"""

import atexit
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from twotower.arguments import THREADS, check_fields, nonempty, one_of, require
from twotower.backends import (
    BACKENDS,
    BackendName,
    DTypeName,
    Quantization,
    Setup,
    accelerate,
    is_native,
    planned_setup,
    refusal,
)
from twotower.checkpoint import (
    find_device,
    generation_defaults,
    has_denoiser,
    load_checkpoint,
    resolve,
    save_backbone,
    save_two_towers,
)
from twotower.checkpoint.denoiser import find_denoiser, load_denoiser
from twotower.checkpoint.empty import Towers, build_empty
from twotower.checkpoint.files import GENERATION_FILE, SHIPPED, has_quantised_blocks
from twotower.checkpoint.generation import log_unheeded
from twotower.checkpoint.load import TooLarge
from twotower.checkpoint.quantize import read_scheme
from twotower.cores import usable_cores
from twotower.documented import public_options
from twotower.families import read_config
from twotower.model import TwoTower
from twotower.model.precision import NATIVE_SCHEMES, ExpertStorage, Scheme
from twotower.paths import usable_path
from twotower.tokenizer import TOKENIZER_FILE, Tokenizer, load_fitting_tokenizer

QuantizationName = Literal["auto", "none", "int8", "int4", "gguf"]
PEER = "peer"
_log = logging.getLogger(__name__)
START_TIMEOUT_S = 300.0  # until both ranks are there; the first import of torch may take long
PEER_TIMEOUT_S = 30.0  # of silence, from then on


@public_options
@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which model to load, where and how."""

    model: str | None = None
    """Checkpoint folder, GGUF file or hub id owner/name. Default: shipped, the small model inside
    this package."""
    denoiser: str | None = None
    """Folder or hub id of a denoiser that `twotower adapt` trained for this model: it drafts and
    the model verifies, so the text is the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps. auto: the first CUDA device if there is one, else the CPU."""
    denoiser_device: str | None = None
    """Device of the denoiser tower. Default: `device`. peer: the second of two processes that
    torchrun started, on this host or another."""
    dtype: DTypeName = "auto"
    """Precision of the weights. Eager and graphs passes compute in it, native ones in float32.
    auto: the checkpoint's own; on a CPU float32 for commands that do more than decode natively,
    such as scores and training, if that fits into memory."""
    quantization: QuantizationName = "auto"
    """int8, int4: quantise the weights while they are loaded, for the native backend; int8 also for
    graphs. gguf: keep the bits of a GGUF file, 4 or 8 in each matrix, for the native backend. none:
    full precision. auto: gguf where a command decodes natively from such a file, else none."""
    kv_cache_dtype: DTypeName = "auto"
    """Precision in which native passes keep keys and values; bfloat16 and float16 take half the
    memory. auto: what the backend computes in, float32 for native passes."""
    backend: BackendName = "auto"
    """What runs forward passes. native: C++ on a CPU, compiled on first use. eager: PyTorch, for
    every model and device. graphs: CUDA graphs of fixed shapes. auto: native if it can run the
    model, else eager."""
    threads: int | None = None
    """CPU threads of a forward pass. Default: the physical cores that this process may use, at most
    OMP_NUM_THREADS."""
    expert_storage: ExpertStorage = "memory"
    """mmap: map the files of routed experts into memory and read those that the router chooses, for
    models larger than memory; as slow as the disk."""

    def __post_init__(self) -> None:
        checks = {
            "dtype": one_of(*get_args(DTypeName)),
            "quantization": one_of(*get_args(QuantizationName)),
            "kv_cache_dtype": one_of(*get_args(DTypeName)),
            "backend": one_of(*BACKENDS),
            "expert_storage": one_of(*get_args(ExpertStorage)),
            "threads": THREADS,
            **dict.fromkeys(
                ("model", "denoiser", "revision", "device", "denoiser_device"), nonempty
            ),
        }
        check_fields(self, checks)
        if self.revision is not None and (
            self.model is None or usable_path("model", self.model).exists()
        ):
            raise ValueError(
                f"revision={self.revision!r} is of a hub id, and the model is a local one; leave "
                "it out"
            )

    @property
    def name(self) -> str:
        """What the model is called in messages and records."""
        return self.model or SHIPPED

    def find(self) -> Path:
        """The model's folder, downloaded if it must be; ValueError (one line) if there is none."""
        return resolve(self.name, self.revision)


def placement_of(options: Placement, **changes: object) -> Placement:
    """The placement among the options of a verb."""
    values = {field.name: getattr(options, field.name) for field in fields(Placement)}
    return Placement(**values | changes)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model, its tokenizer (None if it has none), its folder, and how it was named."""

    name: str
    model: TwoTower
    tokenizer: Tokenizer | None
    folder: Path

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer of what reads or writes text; ValueError (one line) without one."""
        if self.tokenizer is None:
            is_file = self.name.lower().endswith(".gguf")
            raise ValueError(
                f"model={self.name} was written without a tokenizer; export it anew from a folder "
                "that has one"
                if is_file
                else f"model={self.name} has no {TOKENIZER_FILE}; add the one it was made for"
            )
        return self.tokenizer


def load(
    placement: Placement,
    mode: str | None = None,
    show: Callable[[float], None] | None = None,
    only_decodes: bool = False,
) -> Loaded:
    """The model of a placement and its tokenizer, with the towers that a decoding mode needs.

    mode None: the model's own default. AR decoding loads the context tower alone. show: gets the
    share of the weights that has been read. only_decodes: whether nothing but passes of decoding
    will use the weights, so that native ones may read them in the precision of their files.
    """
    _set_threads(placement)
    folder = placement.find()
    quantization = settled_quantization(placement, folder, only_decodes)
    placement = replace(placement, quantization=quantization)
    defaults = generation_defaults(folder)
    log_unheeded(folder / GENERATION_FILE, defaults)
    tokenizer = load_fitting_tokenizer(folder, read_config(folder).vocab_size)
    _refuse_idle_denoiser(placement, mode, placement.denoiser is not None or has_denoiser(folder))
    if placement.denoiser is not None:
        find_denoiser(read_config(folder), placement.denoiser)  # before the weights are read
    if placement.denoiser_device == PEER:
        model = _load_split(folder, placement)
    else:
        is_ar = (mode or defaults.get("mode")) == "ar" or not has_denoiser(folder)
        model = _load_towers(folder, placement, "context" if is_ar else "both", show, only_decodes)
    if tokenizer is not None:
        model.unused_ids = tokenizer.unused_ids(model.config.vocab_size)
    return Loaded(name=placement.name, model=model, tokenizer=tokenizer, folder=folder)


def outline(placement: Placement) -> Loaded:
    """The context tower's shapes without memory or values, and the tokenizer: for who hands out
    prompts to other processes.
    """
    _set_threads(placement)
    folder = placement.find()
    model = build_empty(read_config(folder), "context")
    return Loaded(
        name=placement.name,
        model=model,
        tokenizer=load_fitting_tokenizer(folder, read_config(folder).vocab_size),
        folder=folder,
    )


def _set_threads(placement: Placement) -> None:
    torch.set_num_threads(placement.threads or min(torch.get_num_threads(), usable_cores()))


def load_model(
    model: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: DTypeName | torch.dtype = "auto",
    denoiser: str | Path | None = None,
    revision: str | None = None,
    denoiser_device: str | torch.device | None = None,
    quantization: QuantizationName = "auto",
    kv_cache_dtype: DTypeName | torch.dtype = "auto",
    backend: BackendName = "auto",
    threads: int | None = None,
    expert_storage: ExpertStorage = "memory",
) -> TwoTower:
    """A model ready to decode; without arguments the small one inside this package.

    model: checkpoint folder, GGUF file or hub id; the other arguments are those of `Placement`.
    With a quantization the matrices are packed, and no tensors any more: such a model decodes, and
    is neither saved nor trained. `has_denoiser` tells whether it can fill blocks or decodes token
    by token alone. ValueError (one line) for anything unusable.
    """
    require("model", model, (str, Path, type(None)), "a path or hub id")
    require("denoiser", denoiser, (str, Path, type(None)), "a path or hub id")
    require("device", device, (str, torch.device), "cpu, cuda or another device")
    require("denoiser_device", denoiser_device, (str, torch.device, type(None)), "a device")
    placement = Placement(
        model=None if model is None else str(model),
        denoiser=None if denoiser is None else str(denoiser),
        revision=revision,
        device=str(device),
        denoiser_device=None if denoiser_device is None else str(denoiser_device),
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]  # checked there
        quantization=quantization,
        kv_cache_dtype=str(kv_cache_dtype).removeprefix("torch."),  # type: ignore[arg-type]
        backend=backend,
        threads=threads,
        expert_storage=expert_storage,
    )
    return load(placement).model


def save_model(
    model: TwoTower,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model, its tokenizer and its generation defaults to a folder that `load_model` takes.

    Both towers, or the context tower alone where there is no other. dtype None keeps each weight's.
    Whole or not at all; ValueError (one line) for a full disk, or a folder of something else.
    """
    require("model", model, TwoTower, "twotower.load_model(path)")
    require("folder", folder, (str, Path), "a path")
    require("tokenizer", tokenizer, (Tokenizer, type(None)), "twotower.load_tokenizer(path)")
    require("dtype", dtype, (torch.dtype, type(None)), "torch.bfloat16 or another dtype")
    files = {} if tokenizer is None else tokenizer.files()
    if model.generation_defaults:
        files[GENERATION_FILE] = json.dumps(dict(model.generation_defaults), indent=2).encode()
    save = save_backbone if model.denoiser_tower is None else save_two_towers
    save(model, folder, dtype=dtype, extra_files=files)


def _refuse_idle_denoiser(placement: Placement, mode: str | None, has_any: bool) -> None:
    """ValueError for a denoiser, or its device, that the mode or the model does not use."""
    for name in ("denoiser", "denoiser_device"):
        if getattr(placement, name) is not None and (mode == "ar" or not has_any):
            where = "in mode ar" if mode == "ar" else "on a model without a denoiser"
            raise ValueError(f"{name}: has no effect {where}; leave it out")


def _load_towers(
    folder: Path,
    placement: Placement,
    towers: Towers,
    show: Callable[[float], None] | None = None,
    only_decodes: bool = False,
) -> TwoTower:
    device, elsewhere = _devices(placement)
    dtype = _dtype(folder, placement, device)
    setup = _setup(folder, placement, {device, elsewhere})
    packing = _packing(placement, setup)
    # Exact in native passes, which compute in float32 either way.
    is_exact = placement.dtype == "auto" and only_decodes and is_native(placement.backend, setup)
    keeps_halves = packing is not None or is_exact
    read = partial(
        load_checkpoint,
        folder,
        context_device=device,
        denoiser_device=elsewhere,
        # A thin denoiser shares weights of the context tower.
        towers=towers if placement.denoiser is None else "context",
        expert_storage=placement.expert_storage,
        show=show,
    )
    try:
        model = read(dtype=dtype, packing=packing, keeps_halves=keeps_halves)
    except TooLarge as error:
        if placement.dtype != "auto" or dtype is None or keeps_halves:
            raise
        dtype, model = None, read(dtype=None)
        _log.warning("%s; kept in its own dtype", error)
    if placement.denoiser is not None:
        where = find_device(elsewhere)
        model = load_denoiser(model, placement.denoiser, where, dtype, keeps_halves)
    return accelerate(model, placement.backend, setup.quantization, placement.kv_cache_dtype)


def settled_quantization(
    placement: Placement, folder: Path, only_decodes: bool = True
) -> Quantization:
    """What `quantization=auto` stands for on the model in a folder, for who only decodes, or else.
    ValueError (one line) for gguf on a model that is no GGUF file with quantised matrices.
    """
    asked = placement.quantization
    if asked != "auto" and asked != "gguf":
        return asked
    is_file = has_quantised_blocks(folder)
    if asked == "gguf" and not is_file:
        raise ValueError(
            f"quantization=gguf: {placement.name} is no GGUF file with quantised matrices; use "
            "int8, int4 or none"
        )
    if asked == "gguf" or not (is_file and only_decodes and placement.dtype == "auto"):
        return "none" if asked == "auto" else "gguf"
    setup = _setup(folder, replace(placement, quantization="gguf"), {*_devices(placement)})
    return "gguf" if is_native(placement.backend, setup) else "none"


def _devices(placement: Placement) -> tuple[str, str]:
    """Of the context tower, and of the denoiser in this process."""
    context = _device(placement.device)
    is_apart = placement.denoiser_device not in (None, PEER)
    return context, _device(str(placement.denoiser_device)) if is_apart else context


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(folder: Path, placement: Placement, device: str) -> torch.dtype | None:
    """The dtype to load in; None is the checkpoint's own."""
    if placement.dtype != "auto":
        found: torch.dtype = getattr(torch, placement.dtype)
        return found
    if device != "cpu":
        return None
    setup = planned_setup(read_config(folder), expert_storage=placement.expert_storage)
    return torch.float32 if refusal("native", setup) is None else None


def _setup(folder: Path, placement: Placement, devices: set[str]) -> Setup:
    """What a placement asks of a backend, before its weights are loaded."""
    config = read_config(folder)
    assert placement.quantization != "auto"  # it is settled
    setup = planned_setup(config, placement.quantization, placement.expert_storage)
    is_gguf = has_quantised_blocks(folder)
    scheme = read_scheme(folder)
    return replace(
        setup,
        scheme=scheme,
        is_gguf=is_gguf,
        devices=frozenset(devices),
        kv_cache_dtype=placement.kv_cache_dtype,
    )


def _packing(placement: Placement, setup: Setup) -> Scheme | None:
    """How native passes will pack a checkpoint's matrices, if they are to run it with few bits: as
    they are read, so that no matrix is in memory twice.
    """
    if setup.quantization == "none" or placement.backend == "graphs" or refusal("native", setup):
        return None
    return setup.scheme or NATIVE_SCHEMES[setup.quantization]


def _load_split(folder: Path, placement: Placement) -> TwoTower:
    """The context rank's model. In the denoiser rank this fills blocks and then ends the process:
    the command is the context rank's to run.
    """
    from twotower.hosts import Link, SplitTwoTower, join_ranks, serve_blocks

    rank = join_ranks(START_TIMEOUT_S)
    link = Link(1 - rank, PEER_TIMEOUT_S)
    if rank == 1:
        serve_blocks(_load_towers(folder, placement, "denoiser"), link)
        raise SystemExit(0)
    model = SplitTwoTower(_load_towers(folder, placement, "context"), link)
    atexit.register(model.close)
    return model
