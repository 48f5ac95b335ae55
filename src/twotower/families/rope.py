"""How files spell rotary positions: config.json of transformers 5 and before, and GGUF."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from twotower.config import TowerConfig
from twotower.families.fields import (
    Values,
    read_spec,
    refuse,
    require,
    typed,
    with_synonyms,
    write_spec,
)
from twotower.families.gguf_metadata import short
from twotower.layers.rope import inverse_frequencies
from twotower.specs import RopeScaling, RopeSpec

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ORIGINAL = "original_max_position_embeddings"
_ROPE = {
    "theta": "rope_theta",
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": _ORIGINAL,
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
}
_STRETCHED = ("theta", "factor", "original_max_positions")
_YARN = ("beta_fast", "beta_slow", "truncate", "attention_factor")
_ROPE_TYPES: dict[str, tuple[RopeScaling, tuple[str, ...], tuple[str, ...]]] = {
    # our name, the fields that must be there, and those that may
    "default": ("none", ("theta",), ()),
    "linear": ("linear", ("theta", "factor"), ()),
    "llama3": ("llama3", (*_STRETCHED, "low_freq_factor", "high_freq_factor"), ()),
    "yarn": ("yarn", _STRETCHED, _YARN),
}
_GGUF_YARN = {  # what llama.cpp computes with, where the file does not say otherwise
    "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0,
    "yarn_log_multiplier": 0.0,
}  # fmt: skip


def read_rope(values: Values) -> RopeSpec:
    """The rotary positions, in the spelling of transformers 5 or the one before, which is the one
    that counts in a file with both.
    """
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(name) or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.json: {name}={reprlib.repr(given)} must be an object")
    if kinds := [kind for kind, value in given.items() if isinstance(value, dict)]:
        raise ValueError(
            f"config.json: {name} gives each kind of layer its own values "
            f"({', '.join(map(str, kinds))}), which is not supported; only one for all"
        )
    found = with_synonyms(given, {"type": "rope_type"})
    kind = found.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise ValueError(
            f"config.json: rope_type={reprlib.repr(kind)} is not supported; supported are "
            f"{', '.join(_ROPE_TYPES)}"
        )
    refuse(found, {"partial_rotary_factor": 1.0})
    scaling, needed, others = _ROPE_TYPES[kind]
    found.setdefault("rope_theta", values.get("rope_theta", 10_000.0))
    # transformers prefers the one outside.
    if (original := values.get(_ORIGINAL)) is not None:
        found[_ORIGINAL] = original
    found.setdefault(_ORIGINAL, values.get("max_position_embeddings"))
    require(found, [_ROPE[name] for name in needed])
    if scaling == "yarn" and "attention_factor" not in found:
        found["attention_factor"] = _yarn_attention(found)
    names = {name: _ROPE[name] for name in (*needed, *others)}
    return read_spec(RopeSpec, found, names, scaling=scaling)


def read_rotary_blocks(values: Values, num_blocks: int) -> list[bool]:
    """Whether each block's attention has positions, in a family where some have none."""
    given = values.get("no_rope_layers")
    if given is None:
        interval = typed("no_rope_layer_interval", values["no_rope_layer_interval"], int)
        assert isinstance(interval, int)
        return [interval < 1 or (i + 1) % interval != 0 for i in range(num_blocks)]
    if not isinstance(given, list) or len(given) != num_blocks or {*map(str, given)} - {*"01"}:
        raise ValueError(
            f"config.json: no_rope_layers={reprlib.repr(given)} must be a 0 (no positions) or "
            f"a 1 for each of {num_blocks} layers"
        )
    return [bool(one) for one in given]


def _yarn_attention(values: Values) -> float:
    """By how much YaRN scales queries and keys where a file does not say it."""
    factor, *scales = (
        typed(name, values.get(name, 0.0), float) for name in ("factor", "mscale", "mscale_all_dim")
    )
    assert isinstance(factor, float)
    growth = 0.1 * math.log(max(factor, 1.0))
    if not all(scales):
        return growth + 1.0
    above, below = (growth * scale + 1.0 for scale in scales)  # type: ignore[operator]  # floats
    return above / below


def rope_from_gguf(
    found: Mapping[str, Any], head_dim: int, factors: list[float] | None
) -> dict[str, object]:
    """rope_parameters from a GGUF file's metadata and its tensor of factors."""
    if found.get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"rope.dimension_count={found['rope.dimension_count']} is not supported; only the "
            f"head's size, {head_dim}"
        )
    values: dict[str, object] = {"rope_theta": short(found.get("rope.freq_base", 10_000.0))}
    # What is silent, and the older name of the factor: as llama.cpp takes them.
    kind = found.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type={kind!r} is not supported; only none, linear and yarn")
    factor = short(found.get("rope.scaling.factor", found.get("rope.scale_linear", 0.0))) or 1.0
    is_stretched = kind != "none" and factor != 1.0
    if factors is None and is_stretched and kind == "yarn":
        values |= _yarn_of(found)
    if factors is None:
        return values | ({"rope_type": kind, "factor": factor} if is_stretched else {})
    if is_stretched:
        raise ValueError(
            f"rope.scaling.factor={factor} beside rope_freqs.weight is not supported; only one "
            "of them"
        )
    return values | _llama3_of_factors(factors, values, head_dim)


def _yarn_of(found: Mapping[str, Any]) -> dict[str, object]:
    """What belongs to YaRN in a GGUF file's metadata beside its factor."""
    for name, allowed in _GGUF_YARN.items():
        if (value := found.get(f"rope.scaling.{name}", allowed)) != allowed:
            raise ValueError(f"rope.scaling.{name}={value} is not supported; only {allowed}")
    length = found.get("rope.scaling.original_context_length") or found["context_length"]
    return {_ORIGINAL: length}


def _llama3_of_factors(
    factors: list[float], values: Mapping[str, object], head_dim: int
) -> dict[str, object]:
    """The scaling that has these factors, among those of the Llama 3 releases."""
    for factor in (8.0, 32.0):
        found: dict[str, object] = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
        spec = read_rope({"rope_parameters": {**values, **found}})
        plain = inverse_frequencies(replace(spec, scaling="none"), head_dim)
        known = plain / inverse_frequencies(spec, head_dim)
        if len(factors) == len(known) and torch.allclose(known, torch.tensor(factors), rtol=1e-3):
            return found
    raise ValueError("rope_freqs.weight holds factors of no known scaling; use the model's folder")


def write_rope(tower: TowerConfig) -> dict[str, object]:
    """The inverse, in the spelling of transformers 5."""
    spec = RopeSpec(theta=10_000.0) if tower.rotary is None else tower.rotary[0]
    kind = next(name for name, (scaling, *_) in _ROPE_TYPES.items() if scaling == spec.scaling)
    _, needed, others = _ROPE_TYPES[kind]
    return {
        "rope_type": kind,
        **write_spec(spec, {name: _ROPE[name] for name in (*needed, *others)}),
    }


def refuse_gguf_rope(spec: RopeSpec, has_factors: bool) -> None:
    """ValueError (one line) where llama.cpp cannot turn queries and keys so; has_factors: whether
    it reads those of Llama 3 in this family.
    """
    if spec.scaling == "llama3" and not has_factors:
        raise ValueError(
            "rope_type='llama3' cannot be exported: llama.cpp has its factors in llama and mistral "
            "only"
        )
    usual = RopeSpec(
        theta=spec.theta, scaling="yarn", factor=spec.factor,
        original_max_positions=spec.original_max_positions,
        attention_factor=_yarn_attention({"factor": spec.factor}),
    )  # fmt: skip
    if spec.scaling == "yarn" and spec != usual:
        raise ValueError(
            "rope_type='yarn' cannot be exported with beta_fast, beta_slow, truncate or an "
            "attention factor of its own: llama.cpp computes the usual ones"
        )


def add_gguf_rope(writer: "GGUFWriter", spec: RopeSpec) -> None:
    """The metadata of rotary positions."""
    from gguf import RopeScalingType

    writer.add_rope_freq_base(spec.theta)
    if spec.scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[spec.scaling.upper()])
        writer.add_rope_scaling_factor(spec.factor)
    if spec.scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(spec.original_max_positions)
