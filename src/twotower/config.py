"""The model's configuration: released field names, parsed and validated in one place.

Decides what a `config.json` means, also in the spelling of `transformers` 5, and which values this
implementation supports. Source: system.md section 1.
"""

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAMBA, ATTENTION, MOE, MLP = "M", "*", "E", "-"
LAYER_KINDS = {
    MAMBA: "Mamba-2",
    ATTENTION: "attention",
    MOE: "mixture of experts",
    MLP: "dense MLP",
}
_SUPPORTED = {"mamba_hidden_act": "silu", "mlp_hidden_act": "relu2"}
# Sizes that a file must give for each kind of layer: a default would load and compute nonsense.
_SIZES = {
    MAMBA: ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    ATTENTION: ("num_attention_heads", "num_key_value_heads", "head_dim"),
    MOE: (
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    MLP: ("intermediate_size",),
}
_DIVISIONS = {
    MAMBA: ("mamba_num_heads", "n_groups"),
    ATTENTION: ("num_attention_heads", "num_key_value_heads"),
    MOE: ("n_routed_experts", "n_group"),
}
_MOST = 2**24  # of any size: far above every model, and a typing error stays an error message
_BLOCK_TYPES = {
    "linear_attention": MAMBA,
    "mamba": MAMBA,
    "full_attention": ATTENTION,
    "attention": ATTENTION,
    "moe": MOE,
    "mlp": MLP,
}
# What other writers of the same architecture call differently.
_SYNONYMS = {
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "norm_eps": "layer_norm_epsilon",
    "rms_norm_eps": "layer_norm_epsilon",
    "mamba_proj_bias": "use_bias",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one tower; both towers share them. Field names are the released ones.

    Raises ValueError (one line) for a missing, contradictory or unsupported value.
    """

    hybrid_override_pattern: str
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    # attention
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    attention_bias: bool = False
    # Mamba-2
    mamba_num_heads: int = 64
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    mamba_hidden_act: str = "silu"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    chunk_size: int = 128
    # dense MLP
    intermediate_size: int = 4096
    mlp_bias: bool = False
    mlp_hidden_act: str = "relu2"
    # mixture of experts
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    moe_intermediate_size: int = 1024
    moe_shared_expert_intermediate_size: int = 2048
    num_experts_per_tok: int = 2
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # the rest
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    mask_token_id: int = 3
    block_size: int = 16
    bidirectional_mamba: bool = False  # of the denoiser; the context tower is always causal

    def __post_init__(self) -> None:
        for check in (_check_pattern, _check_sizes, _check_divisions, _check_supported, _check_ids):
            check(self)

    @property
    def mamba_width(self) -> int:
        """Channels of a Mamba layer's x: H * P."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that pass the causal convolution: C = H * P + 2 * G * N."""
        return self.mamba_width + 2 * self.n_groups * self.ssm_state_size

    @property
    def kv_elements(self) -> int:
        """Numbers that one token adds to the KV cache, over all attention layers."""
        layers = self.hybrid_override_pattern.count(ATTENTION)
        return 2 * layers * self.num_key_value_heads * self.head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a row; empty when the configuration names none."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else eos

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "ModelConfig":
        """Build from the content of a `config.json`; fields without meaning here are skipped."""
        values = _with_pattern(_accept_synonyms(values))
        _refuse_unsupported(values)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        for kind, sizes in _SIZES.items():
            required += sizes if kind in str(values.get("hybrid_override_pattern")) else ()
        if missing := [name for name in required if values.get(name) is None]:
            raise ValueError(
                f"config.json: missing field {', '.join(missing)}; add it with the model's value"
            )
        given = {n: v for n, v in values.items() if n in fields and (v is not None or _nullable(n))}
        typed = {name: _typed(name, value) for name, value in given.items()}
        return cls(**typed)  # type: ignore[arg-type]  # _typed has checked each

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` (or the folder that holds it)."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file}: no such file; a checkpoint folder holds a config.json")
        values = read_json(file)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {str(error).removeprefix('config.json: ')}") from None

    def to_dict(self) -> dict[str, object]:
        """The fields under their released names, ready for `config.json`."""
        return {**dataclasses.asdict(self), "eos_token_id": _jsonable(self.eos_token_id)}

    @classmethod
    def nano_30b(cls) -> "ModelConfig":
        """The released model: Nemotron-3-Nano-30B-A3B (its published config.json)."""
        return cls(
            hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            hidden_size=2688, vocab_size=131072, num_hidden_layers=52,
            num_attention_heads=32, num_key_value_heads=2, head_dim=128,
            mamba_num_heads=64, mamba_head_dim=64, ssm_state_size=128, n_groups=8, chunk_size=128,
            intermediate_size=1856, n_routed_experts=128, num_experts_per_tok=6, n_shared_experts=1,
            moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
            routed_scaling_factor=2.5,
        )  # fmt: skip


def read_json(file: Path) -> dict[str, object]:
    """A file's JSON object; ValueError (one line) for anything else."""
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); restore the file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); restore the file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object; restore the file")
    return values


def _jsonable(eos: int | tuple[int, ...] | None) -> int | list[int] | None:
    return list(eos) if isinstance(eos, tuple) else eos


def _nullable(name: str) -> bool:
    return name in ("bos_token_id", "eos_token_id", "pad_token_id")


def _accept_synonyms(values: Mapping[str, object]) -> dict[str, object]:
    """The same values, with the released names filled in from other writers' names."""
    found = dict(values)
    for other, name in _SYNONYMS.items():
        if found.get(name) is None and found.get(other) is not None:
            found[name] = found[other]
    return found


def _with_pattern(values: dict[str, object]) -> dict[str, object]:
    """The same values, with the pattern made of a list of block types, and its length."""
    kinds = values.get("layers_block_type")
    if values.get("hybrid_override_pattern") is None and isinstance(kinds, list):
        unknown = [k for k in kinds if not isinstance(k, str) or k not in _BLOCK_TYPES]
        if unknown:
            raise ValueError(
                f"config.json: layers_block_type has unknown entry {reprlib.repr(unknown[0])}; "
                f"allowed are {', '.join(_BLOCK_TYPES)}"
            )
        values["hybrid_override_pattern"] = "".join(_BLOCK_TYPES[kind] for kind in kinds)
    pattern = values.get("hybrid_override_pattern")
    if isinstance(pattern, str) and values.get("num_hidden_layers") is None:
        values["num_hidden_layers"] = len(pattern)
    return values


def _refuse_unsupported(values: Mapping[str, object]) -> None:
    """ValueError for fields that change the model and have no counterpart here."""
    for name in ("sliding_window", "moe_latent_size"):
        if values.get(name) is not None:
            raise ValueError(
                f"config.json: {name}={reprlib.repr(values[name])} is not supported; only null"
            )
    limit = values.get("time_step_limit")
    if limit is not None and not _is_unlimited(limit):
        raise ValueError(
            f"config.json: time_step_limit={reprlib.repr(limit)} is not supported; "
            "only [0, Infinity]"
        )


def _is_unlimited(limit: object) -> bool:
    """Whether a step-size limit is (0, inf); `transformers` 5 writes {"__float__": "Infinity"}."""
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        return False
    low, high = (v.get("__float__") if isinstance(v, dict) else v for v in limit)
    if isinstance(high, int | float):
        high = math.inf if high >= 1e30 else high
    return low in (0, "0.0") and high in (math.inf, "Infinity", "inf")


def _typed(name: str, value: object) -> object:
    """Check a JSON value's type; ints pass as floats, lists of ids become tuples."""
    kind = ModelConfig.__annotations__[name]
    if name == "eos_token_id" and isinstance(value, list) and all(type(v) is int for v in value):
        return tuple(value)
    if kind is float and type(value) is int and abs(value) <= _MOST:
        return float(value)
    shown = f"config.json: {name}={reprlib.repr(value)}"
    if isinstance(kind, type) and type(value) is not kind:
        raise ValueError(f"{shown} must be of type {kind.__name__}")
    if not isinstance(kind, type) and value is not None and type(value) is not int:
        raise ValueError(f"{shown} must be a token id or null")
    return value


def _check_pattern(c: ModelConfig) -> None:
    pattern = c.hybrid_override_pattern
    if unknown := [symbol for symbol in pattern if symbol not in LAYER_KINDS]:
        raise ValueError(
            f"config.json: hybrid_override_pattern has unknown symbol {unknown[0]!r} at layer "
            f"{pattern.index(unknown[0])}; allowed are {' '.join(LAYER_KINDS)}"
        )
    if len(pattern) != c.num_hidden_layers or not pattern:
        raise ValueError(
            f"config.json: hybrid_override_pattern has {len(pattern)} symbols but "
            f"num_hidden_layers={c.num_hidden_layers}; they must be equal and at least 1"
        )


def _check_sizes(c: ModelConfig) -> None:
    names = ["hidden_size", "vocab_size", "block_size", "chunk_size"]
    for kind, sizes in _SIZES.items():
        names += sizes if kind in c.hybrid_override_pattern else ()
    for name in names:
        if not 1 <= getattr(c, name) <= _MOST:
            shown = reprlib.repr(getattr(c, name))
            raise ValueError(f"config.json: {name}={shown} must be between 1 and {_MOST}")
    for name in ("layer_norm_epsilon", "time_step_min", "time_step_max", "initializer_range"):
        if not 0 < getattr(c, name) < math.inf:
            raise ValueError(f"config.json: {name}={getattr(c, name)} must be a number above 0")
    for name in ("time_step_floor", "routed_scaling_factor"):
        if not math.isfinite(getattr(c, name)):
            raise ValueError(f"config.json: {name}={getattr(c, name)} must be a finite number")


def _check_divisions(c: ModelConfig) -> None:
    for kind, (whole, part) in _DIVISIONS.items():
        if kind not in c.hybrid_override_pattern:
            continue
        if getattr(c, part) < 1 or getattr(c, whole) % getattr(c, part):
            raise ValueError(
                f"config.json: {whole}={getattr(c, whole)} must be a multiple of "
                f"{part}={reprlib.repr(getattr(c, part))}"
            )
    if MOE not in c.hybrid_override_pattern:
        return
    for name, most in (
        ("topk_group", c.n_group),
        ("num_experts_per_tok", c.topk_group * (c.n_routed_experts // c.n_group)),
    ):
        if not 1 <= getattr(c, name) <= most:
            shown = reprlib.repr(getattr(c, name))
            raise ValueError(f"config.json: {name}={shown} must be between 1 and {most}")


def _check_supported(c: ModelConfig) -> None:
    for name, value in _SUPPORTED.items():
        if getattr(c, name) != value:
            raise ValueError(
                f"config.json: {name}={reprlib.repr(getattr(c, name))} is not supported; "
                f"only {value!r}"
            )
    if c.mlp_bias and MOE in c.hybrid_override_pattern:
        raise ValueError("config.json: mlp_bias=true with E layers is not supported; only false")


def _check_ids(c: ModelConfig) -> None:
    ids = {
        "mask_token_id": c.mask_token_id,
        "bos_token_id": c.bos_token_id,
        "pad_token_id": c.pad_token_id,
    }
    for name, value in [*ids.items(), *(("eos_token_id", eos) for eos in c.eos_token_ids)]:
        if value is not None and not 0 <= value < c.vocab_size:
            raise ValueError(
                f"config.json: {name}={reprlib.repr(value)} is outside the vocabulary; "
                f"allowed are 0 to {c.vocab_size - 1}"
            )
