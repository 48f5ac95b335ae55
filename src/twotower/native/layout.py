"""What Python fills and C++ reads: the structs, and the order of each layer kind's weights.

Declared here alone: ctypes classes and the header layout.h, with which the engine is compiled, are
made of it. Only `layer_of` reads a configuration.
"""

import ctypes

import torch

from twotower.kernels.quantised import BLOCK_TYPES
from twotower.specs import AttentionSpec, LayerSpec, MambaSpec, MLPSpec, MoESpec

LANES = 16  # tokens of a tile: what the widest vector holds
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that are not packed
STORED = (*(str(dtype).removeprefix("torch.") for dtype in DTYPES), *BLOCK_TYPES)
"""What embeddings, and matrices before they are packed, may be in."""
_STRUCTS = {
    # A vector in float32; a matrix in float32, in half precision or packed as `packing.Packed`
    # describes, others null. dtype: of full or half, by DTYPES; group: columns of which a token has
    # one scale; centred: whether int4 scales are bfloat16, offsets those of an 8.
    "Weight": "const float *full, const uint16_t *half, const uint8_t *int8, const uint8_t *int4, "
    "int32_t dtype, int32_t group, int32_t centred",
    # Sizes that a kind does not have are 0. rotary: whether positions turn queries and keys.
    # window: tokens that one attends to, itself among them; 0: all. inner: of an MLP or a shared
    # expert. per_token of the experts are chosen, out of the best kept_groups of groups; their
    # weights, of a softmax over all or of each one's sigmoid, sum to 1 where normalises, times
    # factor. weights: in the order of _KINDS.
    "Layer": "int32_t kind, int32_t q_heads, int32_t kv_heads, int32_t head_dim, int32_t rotary, "
    "int32_t window, int32_t heads, int32_t head_size, int32_t groups, int32_t state, "
    "int32_t taps, int32_t inner, int32_t experts, int32_t per_token, int32_t expert_inner, "
    "int32_t latent, int32_t kept_groups, int32_t softmax, int32_t normalises, float factor, "
    "const Weight *weights",
    # mask (masks, width): embeddings of the id `vocabulary` at each index of a row, of which the
    # last goes on; null where there is none. dtype: of embeddings, by STORED. frequencies (A/2,):
    # the angle of each pair per position, null without rotary layers. turn_factor: what cosines
    # and sines are multiplied by.
    "Tower": "int32_t vocabulary, int32_t width, int32_t num_layers, int32_t masks, float eps, "
    "float turn_factor, int32_t dtype, const void *embeddings, const float *mask, "
    "const float *norm, const float *frequencies, const Layer *layers",
    # A layer's state before a pass: k, v (S, Hk, A), in the dtype that the call has; conv
    # (taps - 1, C), oldest first; ssm (H, P, N). Null where a kind has none.
    "Past": "void *k, void *v, const float *conv, const float *ssm",
    # What a pass of L tokens leaves of a layer, null where nobody needs it: k, v (L, Hk, A); the
    # state after the last token, conv and ssm; or what `twotower_states` makes any state of:
    # window (taps - 1 + L, C) before the convolution, mixed (L, C) after it, step (L, H) after
    # softplus.
    "Outputs": "void *k, void *v, float *conv, float *ssm, float *window, float *mixed, "
    "float *step",
    # One text of a pass: length >= 1 tokens after num_past others, past and out with an entry for
    # each layer; out and added (width,), which is added to its embeddings, may be null. Of a draft
    # that branches: depths (length,), how many tokens of the row come before each; sees (length,),
    # a bit for the index of each token that it attends to. Null where each follows the one before.
    "Row": "int32_t length, int32_t num_past, const int64_t *ids, const Past *past, "
    "const Outputs *out, const float *added, float *hidden, const int32_t *depths, "
    "const uint32_t *sees",
}
ROUTER_BIAS = ".gate.e_score_correction_bias"
# Of each kind its symbol, and its weights' names below `layers.{i}.mixer.`, after the layer's own
# norm; those of `OPTIONAL` that the model lacks are null.
_KINDS = {
    "Mamba": (
        MambaSpec.symbol,
        "in_proj.weight in_proj.bias conv1d.weight conv1d.bias dt_bias A_log D norm.weight "
        "out_proj.weight out_proj.bias",
    ),
    "Attention": (
        AttentionSpec.symbol,
        "q_proj.weight q_proj.bias k_proj.weight k_proj.bias v_proj.weight v_proj.bias "
        "o_proj.weight o_proj.bias q_norm.weight k_norm.weight",
    ),
    "MLP": (
        MLPSpec.symbol,
        "gate_proj.weight gate_proj.bias up_proj.weight up_proj.bias "
        "down_proj.weight down_proj.bias",
    ),
    "Experts": (
        MoESpec.symbol,
        "gate.weight gate.e_score_correction_bias experts.gate_proj experts.up_proj "
        "experts.down_proj shared_experts.gate_proj.weight shared_experts.up_proj.weight "
        "shared_experts.down_proj.weight "
        "fc1_latent_proj.weight fc2_latent_proj.weight",
    ),
}
OPTIONAL = (
    ".bias", ".q_norm.weight", ".k_norm.weight", ".gate_proj.weight", ROUTER_BIAS,
    ".experts.gate_proj", ".shared_experts.up_proj.weight", ".shared_experts.down_proj.weight",
    "_latent_proj.weight",
)  # fmt: skip
_TYPES = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}
address = ctypes.c_void_p


def _fields(name: str) -> list[tuple[str, type]]:
    """The fields of a struct in order, and their ctypes types."""
    pairs = (field.rsplit(" ", 1) for field in _STRUCTS[name].split(", "))
    return [(n.lstrip("*"), address if n[0] == "*" else _TYPES[kind]) for kind, n in pairs]


PAST, OUTPUTS = (tuple(name for name, _ in _fields(struct)) for struct in ("Past", "Outputs"))


class Weight(ctypes.Structure):
    """A parameter as it is, and its packed form if it has one (`packing.Packed`)."""

    _fields_ = _fields("Weight")


class Row(ctypes.Structure):
    """One text of a pass."""

    _fields_ = _fields("Row")


class Layer(ctypes.Structure):
    """Kind, sizes and weights of a layer."""

    _fields_ = _fields("Layer")

    @property
    def channels(self) -> int:
        """Channels of a Mamba layer's convolution."""
        return int(self.heads * self.head_size + 2 * self.groups * self.state)


class Tower(ctypes.Structure):
    """Sizes of a tower, its embeddings, final norm, rotary frequencies and layers."""

    _fields_ = _fields("Tower")


def is_matrix(name: str) -> bool:
    """Whether products take the weight of this name in any precision, and not in float32 alone."""
    return "_proj" in name and not name.endswith(".bias")


def weight_names(kind: int) -> list[str]:
    """The weights of a layer in order, below `layers.{i}.`."""
    names = next(names for symbol, names in _KINDS.values() if ord(symbol) == kind)
    return ["norm.weight", *(f"mixer.{name}" for name in names.split())]


def header() -> str:
    """layout.h: structs, kinds, and for each kind a struct of its weights: pre_norm, then the
    names above without dots and `.weight`.
    """
    kinds = ", ".join([*(name.upper() for name in STORED[: len(DTYPES)]), *BLOCK_TYPES])
    lines = [f"constexpr int LANES = {LANES};", f"enum {{ {kinds} }};"]
    for name, fields in _STRUCTS.items():
        lines.append(f"struct {name} {{ {fields.replace(', ', '; ')}; }};")
    for name, (symbol, names) in _KINDS.items():
        members = names.replace(".weight", "").replace(".", "_").replace(" ", ", ")
        lines.append(f"constexpr int32_t {name.upper()} = '{symbol}';")
        lines.append(f"struct {name}Weights {{ Weight pre_norm, {members}; }};")
    body = "\n".join(lines)
    return f"#pragma once\n#include <cstdint>\nnamespace twotower {{\n{body}\n}}\n"


def layer_of(spec: LayerSpec) -> Layer:
    """Kind and sizes of a layer, without weights."""
    match spec:
        case AttentionSpec():
            sizes = {
                "q_heads": spec.num_heads,
                "kv_heads": spec.num_kv_heads,
                "head_dim": spec.head_dim,
                "rotary": spec.rope is not None,
                "window": spec.window or 0,
            }
        case MambaSpec():
            sizes = {
                "heads": spec.num_heads,
                "head_size": spec.head_dim,
                "groups": spec.num_groups,
                "state": spec.state_size,
                "taps": spec.conv_width,
            }
        case MLPSpec():
            sizes = {"inner": spec.intermediate_size}
        case MoESpec():
            sizes = {
                "experts": spec.num_experts,
                "per_token": spec.experts_per_token,
                "expert_inner": spec.intermediate_size,
                "inner": spec.shared_intermediate_size,
                "latent": spec.latent_size or 0,
                "groups": spec.num_groups,
                "kept_groups": spec.groups_per_token,
                "softmax": spec.router == "softmax",
                "normalises": spec.norm_topk_prob,
            }
            return Layer(kind=ord(spec.symbol), factor=spec.scaling_factor, **sizes)
    return Layer(kind=ord(spec.symbol), **sizes)
