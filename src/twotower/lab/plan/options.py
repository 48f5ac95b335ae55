"""The options of `twotower plan` and what they name: model, machine, widths, efficiency."""

import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from twotower.checkpoint.inspect import Description, describe, describe_preset
from twotower.checkpoint.quantize import read_scheme
from twotower.families import PRESETS
from twotower.lab.plan.efficiency import DEFAULTS, PROFILES, Efficiency
from twotower.lab.plan.hardware import (
    Compute,
    Hardware,
    built_in,
    find_hardware,
    nearest,
    read_hardware,
)
from twotower.lab.plan.passes import Setup, Shape
from twotower.lab.plan.precision import DType, Precision, Width, uniform
from twotower.lab.plan.workload import Workload

SHIPPED = "shipped"
# A published run of the 30B model: 66 denoiser passes for 256 tokens (the port on two DGX Sparks).
PUBLISHED_TOKENS_PER_NFE = 256 / 66
_MOST_BATCH = 2**16


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Whether a model fits a machine, how fast each mode is there, and what a token costs: a
    roofline with three stated parameters of efficiency. Nothing is loaded and nothing measured.
    """

    model: str = "nano-30b"
    """A preset (nano-30b), "shipped", a checkpoint folder or a config.json."""
    hardware: str = "h100-sxm"
    """A machine of the built-in table or of --hardware-file; --list-hardware shows them."""
    hardware_file: Path | None = None
    """TOML file with machines of your own; they win over built-in ones of the same name."""
    devices: int = 1
    """Devices of that kind, or hosts: 1 or 2."""
    precision: Width | None = None
    """Weights of all matrices; a quantised checkpoint's own, else bfloat16. Beside int4 the head
    has 8 bits."""
    experts: Width | None = None
    """Weights of routed and shared experts."""
    projections: Width | None = None
    """Weights of Mamba, attention and MLP matrices."""
    head: Width | None = None
    """Weights of the head."""
    dtype: DType | None = None
    """Embedding table, norms, time conditioning, cache; float32 with float32 weights, else
    bfloat16."""
    compute: Compute | None = None
    """Arithmetic; float32 with float32 weights or where the machine has no bfloat16."""
    efficiency: str | None = None
    """limit, eager-gpu, graph-gpu, eager-cpu, native-cpu or native-int8-cpu; by the kind of
    machine."""
    bandwidth_share: float | None = None
    """Share of the peak bandwidth that is reached; the profile's."""
    arithmetic_share: float | None = None
    """Share of the peak arithmetic that is reached; the profile's."""
    layer_us: float | None = None
    """Microseconds of a layer that are neither; the profile's."""
    batch: int = 1
    """Rows decoded at a time."""
    prompt_tokens: int = 512
    """Tokens of a prompt."""
    new_tokens: int = 256
    """Tokens of an answer."""
    block_size: int | None = None
    """Tokens of a block; the model's."""
    tokens_per_nfe: float | None = None
    """Tokens that a denoiser pass commits, from --results or 3.88, a published run of the 30B."""
    tokens_per_cycle: float | None = None
    """Tokens that a draft and its verification yield, from --results; else only break-even."""
    draft_passes: int = 1
    """Denoiser passes of a draft."""
    results: Path | None = None
    """results.json of twotower evaluate: tokens per pass and per cycle as measured there."""
    max_batch: int = 1024
    """Largest batch of the sweep."""
    price_per_hour: float | None = None
    """Dollars an hour for one device; the table's."""
    out: Path | None = None
    """Folder for plan.json, report.html and its pictures."""
    list_hardware: bool = False
    """Instead: the machines that are known, with the source of their figures."""
    json: bool = False
    """One JSON object on stdout instead of text."""

    def __post_init__(self) -> None:
        if self.devices not in (1, 2):
            raise ValueError(f"devices: {self.devices} is not possible; a tower each on 1 or 2")
        if not 1 <= self.max_batch <= _MOST_BATCH:
            raise ValueError(f"max_batch: {self.max_batch} must be between 1 and {_MOST_BATCH}")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < float("inf"):
            raise ValueError(f"price_per_hour: {self.price_per_hour} must be 0 or more")
        if self.efficiency is not None and self.efficiency not in PROFILES:
            raise ValueError(
                f"efficiency: {self.efficiency!r} is unknown{nearest(self.efficiency, PROFILES)}; "
                f"allowed are {', '.join(PROFILES)}"
            )
        if self.results and None not in (self.tokens_per_nfe, self.tokens_per_cycle):
            raise ValueError(
                "results: has no effect beside tokens_per_nfe and tokens_per_cycle; leave one out"
            )


def known_hardware(file: Path | None) -> dict[str, Hardware]:
    """The built-in machines and those of the file, which win."""
    return built_in() | (read_hardware(file) if file is not None else {})


def describe_model(name: str) -> Description:
    """A preset, the shipped model, or what a folder or config.json says; ValueError (one line)."""
    if Path(name).exists():
        return describe(name)
    if name in PRESETS:
        return describe_preset(name)
    if name == SHIPPED:
        folder = Path(str(resources.files("twotower") / "assets"))
        return replace(describe(folder), source=SHIPPED)
    known = [*PRESETS, SHIPPED]
    raise ValueError(
        f"model: {name!r} is no file or folder{nearest(name, known)}; "
        f"known by name are {', '.join(known)}"
    )


def make_setup(options: PlanOptions, shape: Shape) -> Setup:
    """The model on the machine with widths and efficiency as asked."""
    hardware = find_hardware(options.hardware, known_hardware(options.hardware_file))
    if options.devices > 1 and hardware.link_gb_s is None:
        raise ValueError(
            f"devices: {hardware.name} has no link_gb_s, so two cannot be joined; "
            "give it in a --hardware-file"
        )
    precision = _make_precision(options)
    return Setup(
        shape=shape,
        hardware=hardware,
        precision=precision,
        efficiency=_make_efficiency(options, hardware),
        compute=options.compute or _default_compute(precision, hardware),
    )


def make_workload(options: PlanOptions, block_size: int) -> Workload:
    """What is written, with tokens per pass and cycle from where the options say."""
    per_nfe, per_cycle = options.tokens_per_nfe, options.tokens_per_cycle
    if options.results is not None:
        recorded = read_recorded(options.results)
        per_nfe = recorded.get("tokens_per_nfe") if per_nfe is None else per_nfe
        per_cycle = recorded.get("tokens_per_cycle") if per_cycle is None else per_cycle
    size = options.block_size or block_size
    return Workload(
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        block_size=size,
        tokens_per_nfe=min(PUBLISHED_TOKENS_PER_NFE, size) if per_nfe is None else per_nfe,
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
            f"results: {file} is no results.json; twotower evaluate --out writes one"
        ) from None
    kept = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
    if not kept:
        raise ValueError(f"results: {file} has no block mode; evaluate diffusion or speculative")
    return kept


def _own_width(model: str) -> Width:
    """The weights of a checkpoint that is quantised; bfloat16 for all other models."""
    path = Path(model)
    folder = path.parent if path.name == "config.json" else path
    scheme = read_scheme(folder) if (folder / "config.json").is_file() else None
    return "bfloat16" if scheme is None else scheme.weights


def _make_precision(options: PlanOptions) -> Precision:
    base = uniform(options.precision or _own_width(options.model))
    return Precision(
        experts=options.experts or base.experts,
        projections=options.projections or base.projections,
        head=options.head or base.head,
        dtype=options.dtype or base.dtype,
    )


def _make_efficiency(options: PlanOptions, hardware: Hardware) -> Efficiency:
    profile = PROFILES[options.efficiency or DEFAULTS[hardware.kind]]
    if options.bandwidth_share is not None:
        profile = replace(profile, bandwidth=options.bandwidth_share)
    if options.arithmetic_share is not None:
        profile = replace(profile, arithmetic=options.arithmetic_share)
    if options.layer_us is not None:
        profile = replace(profile, layer_s=options.layer_us / 1e6)
    return profile


def _default_compute(precision: Precision, hardware: Hardware) -> Compute:
    is_wide = precision.projections == "float32" or "bfloat16" not in hardware.tflops
    return "float32" if is_wide else "bfloat16"
