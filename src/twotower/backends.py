"""The backends that run a model's decoding passes, and the one rule of what each of them runs.

eager is plain PyTorch, native one C++ call a pass, graphs one recording of a GPU. A backend runs
every pass of a model or refuses the model when it is built, in one sentence; nothing falls back
afterwards. Another backend is one more entry of `_BACKENDS`.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from twotower.arguments import check, one_of, require
from twotower.config import TwoTowerConfig
from twotower.graphs.backend import ONE_DEVICE, GraphsBackend
from twotower.model import TwoTower
from twotower.model.backend import Backend
from twotower.model.eager import EagerBackend
from twotower.model.passes import Unreadable
from twotower.model.precision import (
    ExpertStorage,
    Scheme,
    has_mapped_experts,
    placement_refusal,
    scheme_of,
)
from twotower.native.backend import NativeBackend
from twotower.native.layout import DTYPES
from twotower.native.library import is_available
from twotower.specs import AttentionSpec, LayerSpec, MambaSpec, MoESpec

BackendName = Literal["auto", "eager", "native", "graphs"]
Quantization = Literal["none", "int8", "int4", "gguf"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
ROUNDINGS = tuple(name for name in QUANTIZATIONS if name != "gguf")
"""Those of any weights in memory."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All of a model that decides which backends run it."""

    layers: frozenset[LayerSpec]
    """Of both towers."""
    quantization: Quantization = "none"
    """What the loaded weights are to be rounded to."""
    scheme: Scheme | None = None
    """How the checkpoint is quantised; None: full precision."""
    is_gguf: bool = False
    """Whether it is a GGUF file with quantised matrices, and was loaded in its bits or will be."""
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32})
    devices: frozenset[str] = frozenset({"cpu"})
    expert_storage: ExpertStorage = "memory"
    bidirectional_mamba: bool = False
    kv_cache_dtype: DTypeName = "auto"


def setup_of(
    model: TwoTower,
    quantization: Quantization = "none",
    kv_cache_dtype: DTypeName = "auto",
) -> Setup:
    """The setup of a loaded model; parts without memory (on the meta device) do not count."""
    loaded = [parameter for parameter in model.parameters() if not parameter.is_meta]
    return Setup(
        layers=frozenset(model.config.context.layers + model.config.denoiser.layers),
        quantization=quantization,
        scheme=scheme_of(model),
        is_gguf=bool(model.unread) and all(m.stored_bits for m in model.unread.values()),
        dtypes=frozenset(p.dtype for p in loaded),
        devices=frozenset(p.device.type for p in loaded),
        expert_storage="mmap" if has_mapped_experts(model) else "memory",
        bidirectional_mamba=model.config.bidirectional_mamba,
        kv_cache_dtype=kv_cache_dtype,
    )


def planned_setup(
    config: TwoTowerConfig,
    quantization: Quantization = "none",
    expert_storage: ExpertStorage = "memory",
) -> Setup:
    """The setup of full-precision weights in float32 on the CPU, before they are loaded."""
    return Setup(
        layers=frozenset(config.context.layers + config.denoiser.layers),
        quantization=quantization,
        expert_storage=expert_storage,
        bidirectional_mamba=config.bidirectional_mamba,
    )


def refusal(backend: BackendName, setup: Setup) -> str | None:
    """Why a backend does not run a setup, in one sentence, or None if it does."""
    misplaced = placement_refusal(setup.scheme, setup.expert_storage, setup.devices)
    return misplaced or _BACKENDS[backend].refusal(setup)


def is_native(backend: BackendName, setup: Setup) -> bool:
    """Whether native passes will run a setup, asked for by this name."""
    return backend in ("auto", "native") and refusal("native", setup) is None and is_available()


def _eager_refusal(setup: Setup) -> str | None:
    if setup.quantization != "none":
        return "eager passes run weights as they are loaded"
    return _own_kv_dtype("eager", setup)


def _own_kv_dtype(backend: BackendName, setup: Setup) -> str | None:
    if setup.kv_cache_dtype == "auto":
        return None
    return f"{backend} passes keep keys and values in what they compute in"


def _native_refusal(setup: Setup) -> str | None:
    keys = {(x.num_kv_heads, x.head_dim) for x in setup.layers if isinstance(x, AttentionSpec)}
    states = {
        (x.num_heads, x.head_dim, x.num_groups, x.state_size, x.conv_width)
        for x in setup.layers
        if isinstance(x, MambaSpec)
    }
    others = {str(t).removeprefix("torch.") for t in setup.dtypes.difference(DTYPES)}
    stored = None if setup.scheme is None else setup.scheme.weights
    rounds_weights_alone = setup.scheme is not None and setup.scheme.activations is None
    for is_refused, sentence in (
        (setup.expert_storage == "mmap", f"native passes have no {MoESpec.label} in files"),
        (len(keys) > 1 or len(states) > 1, "native passes need states of one size in all layers"),
        (setup.devices != {"cpu"}, f"native passes run on the CPU, not on {_list(setup.devices)}"),
        (
            setup.quantization == "gguf" and not setup.is_gguf,
            "these weights were not loaded with quantization=gguf",
        ),
        (bool(others), f"native passes read no weights in {_list(others)}"),
        (setup.bidirectional_mamba, "native passes have no bidirectional Mamba"),
        (
            setup.kv_cache_dtype != "auto" and not keys,
            "without attention a model has no keys and values",
        ),
        (
            stored is not None and setup.quantization not in ("none", stored),
            f"native passes round full-precision weights, and this checkpoint's are {stored}",
        ),
        (
            rounds_weights_alone and setup.quantization == "none",
            f"native {stored} products round activations too, and this checkpoint's weights alone "
            f"are {stored}",
        ),
    ):
        if is_refused:
            return sentence
    return None


def _graphs_refusal(setup: Setup) -> str | None:
    has_experts = any(isinstance(layer, MoESpec) for layer in setup.layers)
    is_on_gpu, dtypes = "cuda" in setup.devices, {str(t)[len("torch.") :] for t in setup.dtypes}
    others, stored = setup.devices - {"cpu", "cuda"}, setup.scheme and setup.scheme.weights
    is_wide = stored is None and setup.quantization == "none"
    own_kv_dtype = _own_kv_dtype("graphs", setup)
    for is_refused, sentence in (
        (own_kv_dtype is not None, own_kv_dtype),
        (setup.quantization == "int4", "graphs passes round weights to int8, not to int4"),
        (setup.quantization == "gguf", "graphs passes read no GGUF types"),
        (
            setup.quantization == "int8" and stored == "int4",
            "graphs passes round full-precision weights, and this checkpoint's are int4",
        ),
        (bool(others), f"graphs passes run on CUDA devices, not on {_list(others)}"),
        (len(setup.devices) > 1, f"{ONE_DEVICE}, not on {_list(setup.devices)}"),
        (
            has_experts and (stored == "int4" or setup.expert_storage == "mmap"),
            f"graphs passes have no {MoESpec.label} in int4 or in files",
        ),
        (
            has_experts and is_on_gpu and is_wide and "bfloat16" not in dtypes,
            f"graphs passes run a {MoESpec.label} in bfloat16 on a GPU, not in {_list(dtypes)}",
        ),
    ):
        if is_refused:
            return sentence
    return None


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


@dataclass(frozen=True)
class _Entry:
    refusal: Callable[[Setup], str | None]
    build: Callable[[TwoTower, Setup], Backend]


def _native(model: TwoTower, setup: Setup) -> Backend:
    name = "float32" if setup.kv_cache_dtype == "auto" else setup.kv_cache_dtype
    return NativeBackend(model, setup.quantization, getattr(torch, name))


_BACKENDS: dict[str, _Entry] = {
    "native": _Entry(_native_refusal, _native),
    "eager": _Entry(_eager_refusal, lambda model, _: EagerBackend(model)),
    "graphs": _Entry(
        _graphs_refusal, lambda model, setup: GraphsBackend(model, setup.quantization)
    ),
}


def _tried(backend: BackendName) -> tuple[BackendName, ...]:
    """The backends that a name stands for, in the order in which they are tried."""
    return ("native", "eager") if backend == "auto" else (backend,)


def accelerate(
    model: TwoTower,
    backend: BackendName = "auto",
    quantization: Quantization = "none",
    kv_cache_dtype: DTypeName = "auto",
) -> TwoTower:
    """The model with its decoding passes run by a backend: same methods, same weights.

    eager: plain PyTorch, every model and device. native: C++ on the CPU, compiled on first use and
    kept in the user's cache; float32, also of weights in half precision, which it reads where they
    lie. graphs: passes of fixed shapes, which a CUDA device records and replays. auto: the first of
    native and eager that runs the model; one log line says which, and why not the other.
    quantization=int8, int4: native passes with projections rounded to 8 or 4 bits now; graphs
    passes have int8. gguf: as the file has them, for a model that was loaded so. kv_cache_dtype: of
    the keys and values that native passes keep; auto: what a backend computes in. The weights must
    not change afterwards. ValueError (one line) for what cannot run.
    """
    choices = {
        "backend": one_of(*BACKENDS),
        "quantization": one_of(*QUANTIZATIONS),
        "kv_cache_dtype": one_of(*get_args(DTypeName)),
    }
    given = {"backend": backend, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    check(given, choices)
    require("model", model, TwoTower, "twotower.load_model(path)")
    if backend == "graphs" or quantization == "none":
        model.require_read(f"backend={backend} quantization={quantization}")
    setup, reasons = setup_of(model, quantization, kv_cache_dtype), list[str]()
    for name in _tried(backend):
        try:
            if (reason := refusal(name, setup)) is not None:
                raise ValueError(reason)
            found = _BACKENDS[name].build(model, setup)
        except Unreadable:
            raise
        except (OSError, ValueError) as error:
            reasons.append(str(error))
            continue
        why = "".join(f" ({reason})" for reason in reasons)
        _log.info("backend=%s quantization=%s%s", name, quantization, why)
        if backend == "auto" and (faster := _faster(setup)) is not None:
            _log.warning(
                "eager passes dequantise the checkpoint's weights for every token; "
                "quantization=%s runs them as they are, many times as fast, and rounds "
                "activations to 8 bits",
                faster,
            )
        return model if name == model.backend.name == "eager" else model.with_backend(found)
    raise ValueError(_complaint(backend, setup, reasons))


def _faster(setup: Setup) -> Quantization | None:
    """What to ask for, where native passes would run a checkpoint that eager ones run now."""
    is_slow = setup.quantization == "none" and refusal("native", setup) is not None
    return _own_bits(setup) if is_slow else None


def _own_bits(setup: Setup) -> Quantization | None:
    """The bits of a checkpoint that native passes would run, if they were asked for."""
    if setup.scheme is None or setup.quantization == setup.scheme.weights:
        return None
    asked = replace(setup, quantization=setup.scheme.weights)
    return setup.scheme.weights if refusal("native", asked) is None else None


def _complaint(backend: BackendName, setup: Setup, reasons: list[str]) -> str:
    if setup.kv_cache_dtype != "auto":
        free = replace(setup, kv_cache_dtype="auto")
        if any(refusal(name, free) is None for name in _tried(backend)):
            return f"kv_cache_dtype={setup.kv_cache_dtype}: {reasons[0]}; use kv_cache_dtype=auto"
        return _complaint(backend, free, reasons)
    own = _own_bits(setup)
    if setup.quantization == "none":
        others = "backend=eager" if own is None else f"quantization={own} or backend=eager"
        return f"backend={backend}: {reasons[0]}; use {others}"
    remedy = "use quantization=none, or a checkpoint that `twotower convert` has quantised"
    other: BackendName = "graphs" if "cuda" in setup.devices else "native"
    if refusal(other, setup) is None:
        remedy = f"use backend={other} or quantization=none"
    if own is not None:
        remedy = f"use backend=native with quantization={own}, or quantization=none"
    return f"quantization={setup.quantization}: {reasons[0]}; {remedy}"
