"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: Mamba-2, attention, MLP and experts by a pattern.

Its file names are the ones of the released two-tower model. Source: system.md section 1;
transformers 5 NemotronHConfig for the newer spellings.
"""

import math
import re
import reprlib

from twotower.config import InitSpec, TowerConfig, TwoTowerConfig
from twotower.families.fields import (
    Values,
    read_spec,
    read_two_towers,
    refuse,
    refuse_per_layer,
    require,
    required_fields,
    typed,
    with_synonyms,
    write_spec,
    write_two_towers,
)
from twotower.families.nemotron_h_gguf import (
    GGUF_FLOAT32,
    GGUF_READS,
    add_gguf_sizes,
    config_from_gguf,
    gguf_architecture,
    gguf_extra_tensors,
    gguf_shape,
    gguf_values,
    values_from_gguf,
)
from twotower.specs import SPECS, AttentionSpec, LayerSpec, MambaSpec, MLPSpec, MoESpec

__all__ = [  # what `Family` names
    "ARCHITECTURE", "GGUF_FLOAT32", "GGUF_READS", "LAYOUTS", "MODEL_TYPE", "NANO_30B", "TIES_HEAD",
    "TWO_TOWER_ARCHITECTURE", "add_gguf_sizes", "config_from_gguf", "from_tower_name",
    "gguf_architecture", "gguf_extra_tensors", "gguf_lookup_name", "gguf_shape", "gguf_values",
    "read_config", "to_tower_name", "transformers_config", "values_from_gguf", "write_config",
]  # fmt: skip
MODEL_TYPE = "nemotron_h"
ARCHITECTURE = "NemotronHForCausalLM"
TWO_TOWER_ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
LAYOUTS = {"backbone.": "backbone", "model.": "transformers"}
TIES_HEAD = False
NANO_30B: dict[str, object] = {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "hidden_size": 2688, "vocab_size": 131072,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "conv_kernel": 4, "n_routed_experts": 128, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
"""The sizes of the released model's towers: Nemotron-3-Nano-30B-A3B."""

_FIELDS: dict[type[LayerSpec], dict[str, str]] = {
    MambaSpec: {
        "num_heads": "mamba_num_heads",
        "head_dim": "mamba_head_dim",
        "state_size": "ssm_state_size",
        "num_groups": "n_groups",
        "conv_width": "conv_kernel",
        "conv_bias": "use_conv_bias",
        "proj_bias": "use_bias",
    },
    AttentionSpec: {
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "bias": "attention_bias",
        "out_bias": "attention_bias",
    },
    MoESpec: {
        "num_experts": "n_routed_experts",
        "experts_per_token": "num_experts_per_tok",
        "intermediate_size": "moe_intermediate_size",
        "shared_intermediate_size": "moe_shared_expert_intermediate_size",
        "latent_size": "moe_latent_size",
        "num_groups": "n_group",
        "groups_per_token": "topk_group",
        "norm_topk_prob": "norm_topk_prob",
        "scaling_factor": "routed_scaling_factor",
    },
    MLPSpec: {"intermediate_size": "intermediate_size", "bias": "mlp_bias"},
}
_SHARED = _FIELDS[MoESpec]["shared_intermediate_size"]
_TOWER = {
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_epsilon",
    "residual_in_fp32": "residual_in_fp32",
}
_INIT = {
    "std": "initializer_range",
    "rescale_residual": "rescale_prenorm_residual",
    "time_step_min": "time_step_min",
    "time_step_max": "time_step_max",
    "time_step_floor": "time_step_floor",
}
_BLOCK_TYPES: dict[str, type[LayerSpec]] = {
    "linear_attention": MambaSpec,
    "mamba": MambaSpec,
    "full_attention": AttentionSpec,
    "attention": AttentionSpec,
    "moe": MoESpec,
    "mlp": MLPSpec,
}
_TRANSFORMERS_TYPES = {
    MambaSpec: "linear_attention",
    AttentionSpec: "full_attention",
    MoESpec: "moe",
    MLPSpec: "mlp",
}
_WRITTEN_TWICE = {"mamba_proj_bias": "use_bias", "norm_eps": "layer_norm_epsilon"}
# What other writers of the same architecture call differently.
_SYNONYMS = {
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "attention_head_dim": "head_dim",
    "norm_eps": "layer_norm_epsilon",
    "rms_norm_eps": "layer_norm_epsilon",
    "mamba_proj_bias": "use_bias",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
}
_SUPPORTED = {
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "sliding_window": None,
    "is_causal": True,
}
_PER_LAYER = ("layers_block_type", "layer_types", "mtp_layers_block_type", "eos_token_id", "reads")
# transformers clamps the step size from below at `time_step_min`, meant for initialisation only.
# Zero would be exact, but its initialisation takes a logarithm; no step comes near this value.
_NO_CLAMP = 1e-30
# What readers of the released layout look for; nothing here changes the model.
_EXTRAS: dict[str, object] = {
    "attention_dropout": 0.0,
    "chunk_size": 128,
    "hidden_dropout": 0.0,
    "mamba_hidden_act": "silu",
    "mamba_ssm_cache_dtype": "float32",
    "mlp_hidden_act": "relu2",
    "n_shared_experts": 1,
    "sliding_window": None,
    "use_cache": True,
}


def read_config(given: Values) -> TwoTowerConfig:
    """The configuration that config.json describes; ValueError (one line) if it cannot be read."""
    values = with_synonyms(given, _SYNONYMS)
    kinds = _layer_kinds(values)
    refuse(given, _SUPPORTED)
    refuse_per_layer(given, len(kinds), _PER_LAYER)
    _refuse_step_limit(values.get("time_step_limit"))
    if values.get("mlp_bias") and MoESpec in kinds:
        raise ValueError("config.json: mlp_bias=true with E layers is not supported; only false")
    sizes = [
        name for kind in SPECS if kind in kinds for name in required_fields(kind, _FIELDS[kind])
    ]
    require(values, [*required_fields(TowerConfig, _TOWER), *sizes])
    if values.get(_SHARED) == 0 and MoESpec in kinds:
        raise ValueError(f"config.json: {_SHARED}=0 is not supported; only 1 or more")
    specs = {kind: read_spec(kind, values, _FIELDS[kind]) for kind in SPECS if kind in kinds}
    layers = tuple(specs[kind] for kind in kinds)
    tower = read_spec(TowerConfig, values, _TOWER, layers=layers)
    # The released two-tower model leaves out its mask token, 3. A backbone of this family has none:
    # its 3 is an ordinary token.
    own = (
        {"mask_token_id": tower.vocab_size} if given.get("architectures") == [ARCHITECTURE] else {}
    )
    return read_two_towers(
        MODEL_TYPE,
        tower,
        {**own, **given},
        init=read_spec(InitSpec, values, _INIT),
    )


def write_config(config: TwoTowerConfig) -> dict[str, object]:
    """The fields of config.json under their released names; ValueError for uneven layers."""
    tower = config.context
    fields = {
        "hybrid_override_pattern": tower.pattern,
        "num_hidden_layers": tower.num_layers,
        **write_spec(tower, _TOWER),
        **write_spec(config.init, _INIT),
        **write_two_towers(config),
    }
    for kind in SPECS:
        if (spec := tower.shared_spec(kind)) is not None:
            fields |= write_spec(spec, _FIELDS[kind])
    fields |= {name: fields[first] for name, first in _WRITTEN_TWICE.items() if first in fields}
    return {**_EXTRAS, **fields}


def transformers_config(config: TwoTowerConfig) -> dict[str, object]:
    """config.json as `transformers` 5 spells it; ValueError for what it cannot represent."""
    attention = config.context.shared_spec(AttentionSpec)
    if attention is not None and attention.bias:
        raise ValueError("attention_bias=true cannot be exported: transformers 5 has no such bias")
    values = write_config(config)
    del values["hybrid_override_pattern"], values["num_hidden_layers"], values["norm_eps"]
    kinds = [_TRANSFORMERS_TYPES[type(layer)] for layer in config.context.layers]
    return {**values, "layers_block_type": kinds, "time_step_min": _NO_CLAMP}


def to_tower_name(name: str) -> str | None:
    """A single-tower file's tensor under our name inside a tower; None if it has no use here."""
    if name.startswith("mtp."):  # multi-token prediction, beside the backbone in some releases
        return None
    for prefix in LAYOUTS:
        name = name.removeprefix(prefix)
    return name


def from_tower_name(name: str) -> str:
    """The inverse, in the released single-tower layout."""
    return name if name.startswith("lm_head.") else f"backbone.{name}"


def gguf_lookup_name(name: str) -> str:
    """Our name inside a tower as the `gguf` package's table knows it."""
    if match := re.fullmatch(r"layers\.(\d+)\.mixer\.experts\.(\w+)", name):
        return f"model.layers.{match[1]}.mlp.experts.{match[2]}.weight"
    known = from_tower_name(name).replace("dt_bias", "dt.bias")
    return known.replace("e_score_correction_bias", "e_score_correction.bias")


def _layer_kinds(values: Values) -> list[type[LayerSpec]]:
    """The kind of each layer, from the pattern or the list of block types; both must agree."""
    pattern, types = values.get("hybrid_override_pattern"), values.get("layers_block_type")
    found = [_kinds_of_types(types)] if types is not None else []
    if pattern is not None:
        found.insert(0, _kinds_of_pattern(pattern))
    if not found:
        require(values, ["hybrid_override_pattern", *required_fields(TowerConfig, _TOWER)])
    if found[0] != found[-1]:
        raise ValueError(
            "config.json: hybrid_override_pattern contradicts layers_block_type; keep the one that "
            "is right"
        )
    count = values.get("num_hidden_layers", len(found[0]))
    if typed("num_hidden_layers", count, int) != len(found[0]) or not found[0]:
        raise ValueError(
            f"config.json: hybrid_override_pattern has {len(found[0])} symbols but "
            f"num_hidden_layers={reprlib.repr(count)}; they must be equal and at least 1"
        )
    return found[0]


def _kinds_of_pattern(pattern: object) -> list[type[LayerSpec]]:
    symbols = {kind.symbol: kind for kind in SPECS}
    text = str(typed("hybrid_override_pattern", pattern, str))
    for index, symbol in enumerate(text):
        if symbol not in symbols:
            raise ValueError(
                f"config.json: hybrid_override_pattern has unknown symbol {symbol!r} at layer "
                f"{index}; allowed are {' '.join(symbols)}"
            )
    return [symbols[symbol] for symbol in text]


def _kinds_of_types(types: object) -> list[type[LayerSpec]]:
    for one in types if isinstance(types, list) else [types]:
        if not isinstance(one, str) or one not in _BLOCK_TYPES or not isinstance(types, list):
            raise ValueError(
                f"config.json: layers_block_type has unknown entry {reprlib.repr(one)}; "
                f"allowed are {', '.join(_BLOCK_TYPES)}"
            )
    return [_BLOCK_TYPES[one] for one in types] if isinstance(types, list) else []


def _refuse_step_limit(limit: object) -> None:
    """ValueError for a step-size limit other than (0, inf): the scan does not clamp."""
    if limit is not None and not _is_unlimited(limit):
        raise ValueError(
            f"config.json: time_step_limit={reprlib.repr(limit)} is not supported; "
            "only [0, Infinity]"
        )


def _is_unlimited(limit: object) -> bool:
    """Whether a limit is (0, inf); `transformers` 5 writes {"__float__": "Infinity"}."""
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        return False
    low, high = (v.get("__float__") if isinstance(v, dict) else v for v in limit)
    if isinstance(high, int | float):
        high = math.inf if high >= 1e30 else high
    return low in (0, "0.0") and high in (math.inf, "Infinity", "inf")
