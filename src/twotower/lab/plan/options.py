"""The options of `twotower plan` and what they name: model, machine, widths, efficiency."""

import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from twotower.arguments import COUNT, check_fields, nearest, number
from twotower.checkpoint.files import SHIPPED
from twotower.checkpoint.inspect import Description, describe
from twotower.checkpoint.quantize import read_scheme
from twotower.families import PRESETS
from twotower.lab.plan.hardware import Compute, Hardware, built_in, find_hardware, read_hardware
from twotower.lab.plan.inputs import (
    DEFAULTS,
    PROFILES,
    DType,
    Efficiency,
    KVDType,
    Width,
    Widths,
    Workload,
    uniform,
)
from twotower.lab.plan.passes import ModelShape, PlanSetup
from twotower.paths import usable_path
from twotower.specs import MoESpec

# A published run of the 30B model: 66 denoiser passes for 256 tokens (the port on two DGX Sparks).
PUBLISHED_TOKENS_PER_NFE = 256 / 66
_MAX_BATCH = 2**16
PROFILE_FIELDS = ("bandwidth_share", "arithmetic_share", "layer_us")  # of a profile's file


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Estimate whether a model fits a machine, how fast each mode would be and what a token would
    cost, by a roofline model with three efficiency parameters. Nothing is loaded or measured.
    """

    model: str = "nano-30b"
    """nano-30b (the released model), shipped, a checkpoint folder, a GGUF file or a config.json."""
    denoiser: str | None = None
    """Folder or hub id of a denoiser that `twotower adapt` trained for this model."""
    hardware: str = "h100-sxm"
    """Machine, by its name in --list-hardware or in --hardware-file."""
    devices: int = 1
    """Number of such machines: 1, or 2 with a tower each."""
    dtype: DType | None = None
    """Precision of weights and cache. Default: bfloat16."""
    kv_cache_dtype: KVDType | None = None
    """Precision of cached keys and values. Default: that of the cache."""
    quantization: Literal["none", "int8", "int4"] | None = None
    """Quantisation of all matrices; with int4 the head has 8 bits. Default: the checkpoint's."""
    batch_size: int = 1  # as in EngineOptions, whose help it has
    prompt_tokens: int = 512
    """Tokens of each prompt."""
    new_tokens: int = 256
    """Tokens of each answer."""
    block_size: int | None = None
    """Tokens per block. Default: the model's own."""
    tokens_per_nfe: float | None = None
    """Tokens that diffusion commits per denoiser pass. Default: from --results, else 3.88, of a
    published run of the 30B model; with --denoiser only the break-even is shown."""
    tokens_per_cycle: float | None = None
    """Tokens that speculative decoding commits per verification. Default: from --results; without
    them only the break-even is shown."""
    draft_passes: int = 1
    """Denoiser passes per draft."""
    results: Path | None = None
    """results.json of twotower evaluate, for --tokens-per-nfe and --tokens-per-cycle."""
    max_batch_size: int = 1024
    """Largest batch size that is compared."""
    price_per_hour: float | None = None
    """Dollars per hour and device. Default: that of the table of machines."""
    output: Path | None = None
    """Folder for plan.json, report.html and its pictures."""
    json: bool = False
    """Print one JSON object instead of text."""
    list_hardware: bool = False
    """Print the known machines with the sources of their figures, and exit."""
    hardware_file: Path | None = None
    """TOML file with machines of your own."""
    expert_weights: Width | None = None
    """Precision of routed and shared experts. Default: --quantization."""
    projection_weights: Width | None = None
    """Precision of the matrices of Mamba, attention and MLP layers. Default: --quantization."""
    head_weights: Width | None = None
    """Precision of the head. Default: --quantization, but at least 8 bits."""
    compute: Compute | None = None
    """Precision of arithmetic. Default: bfloat16; float32 for float32 weights, or where the machine
    has no bfloat16."""
    efficiency: str | None = None
    """Profile of how well code uses the machine: limit, eager-gpu, graph-gpu, eager-cpu, native-cpu
    or native-int8-cpu; or a TOML file that scripts/gpu/passes.py wrote. Default: eager-gpu or
    eager-cpu."""
    bandwidth_share: float | None = None
    """Fraction of the peak bandwidth that is reached. Default: the profile's."""
    arithmetic_share: float | None = None
    """Fraction of the peak arithmetic that is reached. Default: the profile's."""
    layer_us: float | None = None
    """Microseconds of overhead per layer (launches, Python). Default: the profile's."""

    def __post_init__(self) -> None:
        if self.devices not in (1, 2):
            raise ValueError(f"devices={self.devices} must be 1, or 2 with a tower each")
        most = number(1, _MAX_BATCH, is_whole=True)
        check_fields(
            self, {"max_batch_size": most, "price_per_hour": number(0), "block_size": COUNT}
        )
        name = self.efficiency
        if name is not None and name not in PROFILES and not name.endswith(".toml"):
            raise ValueError(
                f"efficiency: {name!r} is unknown{nearest(name, PROFILES)}; "
                f"allowed are {', '.join(PROFILES)}, or a file that ends in .toml"
            )
        if self.results and None not in (self.tokens_per_nfe, self.tokens_per_cycle):
            raise ValueError(
                "results: has no effect beside tokens_per_nfe and tokens_per_cycle; leave one out"
            )


def known_hardware(file: Path | None) -> dict[str, Hardware]:
    """The built-in machines and those of the file, which win."""
    return built_in() | (read_hardware(file) if file is not None else {})


def describe_model(name: str, denoiser: str | None = None) -> Description:
    """A preset, the shipped model, or what a folder or config.json says, with a thin denoiser where
    one is named; ValueError (one line).
    """
    known = (*PRESETS, SHIPPED)
    if usable_path("model", name).exists():
        return describe(name, denoiser=denoiser)
    if name in known:
        return replace(describe(name, denoiser=denoiser), source=name)
    raise ValueError(
        f"model: {name!r} is not a file or folder{nearest(name, known)}; "
        f"known by name are {', '.join(known)}"
    )


def make_setup(options: PlanOptions, shape: ModelShape) -> PlanSetup:
    """The model on the machine with widths and efficiency as asked."""
    hardware = find_hardware(options.hardware, known_hardware(options.hardware_file))
    if options.devices > 1 and hardware.link_gb_s is None:
        raise ValueError(
            f"devices: {hardware.name} has no link_gb_s, so two cannot be joined; "
            "give it in a --hardware-file"
        )
    has_experts = bool(shape.config.context.layers_of(MoESpec))
    if options.expert_weights is not None and not has_experts:
        raise ValueError("expert_weights: has no effect on a model without experts; leave it out")
    widths = _make_widths(options)
    return PlanSetup(
        shape=shape,
        hardware=hardware,
        widths=widths,
        efficiency=_make_efficiency(options, hardware),
        compute=options.compute or _default_compute(widths, hardware),
    )


def make_workload(options: PlanOptions, block_size: int) -> Workload:
    """What is written, with tokens per pass and cycle from where the options say."""
    per_nfe, per_cycle = options.tokens_per_nfe, options.tokens_per_cycle
    if options.results is not None:
        recorded = read_recorded(options.results)
        per_nfe = recorded.get("tokens_per_nfe") if per_nfe is None else per_nfe
        per_cycle = recorded.get("tokens_per_cycle") if per_cycle is None else per_cycle
    size = options.block_size or block_size
    if per_nfe is None and options.denoiser is None:
        per_nfe = min(PUBLISHED_TOKENS_PER_NFE, size)
    return Workload(
        batch_size=options.batch_size,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        block_size=size,
        tokens_per_nfe=per_nfe,
        tokens_per_cycle=per_cycle,
        draft_passes=options.draft_passes,
    )


def read_recorded(file: Path) -> dict[str, float]:
    """Tokens per pass and per cycle of a results.json; ValueError (one line) if it has neither."""
    try:
        modes = json.loads(file.read_text(encoding="utf-8"))["modes"]
        found = {
            "tokens_per_nfe": modes.get("diffusion", {}).get("tokens_per_nfe"),
            "tokens_per_cycle": modes.get("speculative", {}).get("tokens_per_forward"),
        }
    except OSError as error:
        raise ValueError(f"results: cannot read {file} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"results: {file} is not a results.json; twotower evaluate --output writes one"
        ) from None
    kept = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
    if not kept:
        raise ValueError(f"results: {file} has no block mode; evaluate diffusion or speculative")
    return kept


def _own_width(model: str) -> Width | None:
    """The weights of a checkpoint that is quantised; None for all other models."""
    path = Path(model)
    folder = path.parent if path.name == "config.json" else path
    scheme = read_scheme(folder) if (folder / "config.json").is_file() else None
    return None if scheme is None else scheme.weights


def _make_widths(options: PlanOptions) -> Widths:
    quantized = options.quantization or _own_width(options.model) or "none"
    base = uniform((options.dtype or "bfloat16") if quantized == "none" else quantized)
    return Widths(
        experts=options.expert_weights or base.experts,
        projections=options.projection_weights or base.projections,
        head=options.head_weights or base.head,
        dtype=options.dtype or base.dtype,
        kv_dtype=options.kv_cache_dtype,
    )


def _make_efficiency(options: PlanOptions, hardware: Hardware) -> Efficiency:
    name = options.efficiency or DEFAULTS[hardware.kind]
    profile = PROFILES[name] if name in PROFILES else read_profile(Path(name))
    given = {"bandwidth": options.bandwidth_share, "arithmetic": options.arithmetic_share}
    given["layer_s"] = None if options.layer_us is None else options.layer_us / 1e6
    return replace(profile, **{name: value for name, value in given.items() if value is not None})


def read_profile(file: Path) -> Efficiency:
    """The profile of a file; ValueError (one line) if it cannot be read or is wrong."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"efficiency: cannot read {file} ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"efficiency: {file} is not valid TOML ({error}); correct it") from None
    if {*values} != {*PROFILE_FIELDS} or not all(type(n) in (int, float) for n in values.values()):
        raise ValueError(
            f"efficiency: {file} must have numbers {', '.join(PROFILE_FIELDS)} and nothing else, "
            "as scripts/gpu/passes.py writes them"
        )
    bandwidth, arithmetic, layer_us = (float(values[name]) for name in PROFILE_FIELDS)
    return Efficiency(bandwidth=bandwidth, arithmetic=arithmetic, layer_s=layer_us / 1e6)


def _default_compute(widths: Widths, hardware: Hardware) -> Compute:
    is_wide = widths.projections == "float32" or "bfloat16" not in hardware.tflops
    return "float32" if is_wide else "bfloat16"
