"""Nemotron-H in GGUF files, llama.cpp's architectures nemotron_h and nemotron_h_moe.

Source: llama.cpp src/models/nemotron-h.cpp, conversion/nemotron.py.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from twotower.config import TwoTowerConfig
from twotower.families.gguf_metadata import require_supported, short, special_ids
from twotower.specs import (
    MAX_LAYERS,
    AttentionSpec,
    LayerSpec,
    MambaSpec,
    MLPSpec,
    MoESpec,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

GGUF_READS = ("nemotron_h", "nemotron_h_moe")
# What stays float32 in a GGUF file of any precision: small, and where rounding costs most.
GGUF_FLOAT32 = (".A_log", ".D", ".dt_bias", ".conv1d.weight", ".mixer.norm.weight")
_SUPPORTED = {"attention.causal": True, "expert_group_count": 1}
_MASK = "tokenizer.ggml.mask_token_id"


def gguf_architecture(config: TwoTowerConfig) -> str:
    """llama.cpp's name for it; ValueError for a model that its graph cannot compute."""
    tower = config.context
    kinds = {type(layer) for layer in tower.layers}
    if {MLPSpec, MoESpec} <= kinds or not {MambaSpec, AttentionSpec} <= kinds:
        raise ValueError(
            f"hybrid_override_pattern={tower.pattern} cannot be exported: llama.cpp wants M and * "
            "layers, and - or E but not both"
        )
    mamba, moe = tower.shared_spec(MambaSpec), tower.shared_spec(MoESpec)
    found = {"use_bias": mamba and mamba.proj_bias, "n_group": moe and moe.num_groups}
    for name, allowed in (("use_bias", False), ("n_group", 1)):
        if found[name] not in (None, allowed):
            raise ValueError(
                f"{name}={found[name]} cannot be exported: llama.cpp computes this architecture "
                f"with {name}={allowed} only"
            )
    return "nemotron_h" if moe is None else "nemotron_h_moe"


def gguf_shape(name: str, shape: tuple[int, ...], config: TwoTowerConfig) -> tuple[int, ...]:
    """The shape that llama.cpp expects."""
    if name.endswith((".A_log", ".D")):
        return (*shape, 1)  # (H, 1)
    if name.endswith(".conv1d.weight"):
        return (shape[0], shape[2])  # (C, W)
    mamba = config.context.shared_spec(MambaSpec)
    if name.endswith(".mixer.norm.weight") and mamba is not None:
        return (mamba.num_groups, shape[0] // mamba.num_groups)  # (G, H * P / G)
    return shape


def gguf_values(name: str, values: Tensor, config: TwoTowerConfig) -> Tensor:
    """Values that llama.cpp expects: the decay rates themselves, not their logarithms."""
    return -values.float().exp() if name.endswith(".A_log") else values


def values_from_gguf(name: str, values: Tensor, config: TwoTowerConfig) -> Tensor:
    """The inverse of `gguf_values`."""
    return _log(-values.float()) if name.endswith(".A_log") else values


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: frozenset[str], rope_factors: list[float] | None
) -> dict[str, object]:
    """config.json of a GGUF file. See `Family`."""
    require_supported(metadata, _SUPPORTED)
    kinds = _layer_kinds(metadata)
    sizes: dict[type[LayerSpec], Callable[[_Layers], dict[str, object]]] = {
        MambaSpec: _mamba,
        AttentionSpec: _attention,
        MoESpec: _experts,
        MLPSpec: _mlp,
    }
    values: dict[str, object] = {}
    for kind in dict.fromkeys(kinds):
        at = [index for index, one in enumerate(kinds) if one is kind]
        values |= sizes[kind](_Layers(metadata, tensors, at))
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    ids, mask = special_ids(metadata), metadata.get(_MASK, vocab_size)
    ends = ids["eos_token_id"]
    assert isinstance(ends, list)
    epsilon = "attention.layer_norm_epsilon"
    eps = metadata.get("attention.layer_norm_rms_epsilon", metadata.get(epsilon))
    if eps is None:
        raise KeyError(epsilon)
    return {
        **values,
        **ids,
        # Without an end of its own a model is written with its mask for one.
        "eos_token_id": [end for end in ends if end != mask],
        "mask_token_id": mask,
        "hybrid_override_pattern": "".join(kind.symbol for kind in kinds),
        "num_hidden_layers": len(kinds),
        "hidden_size": metadata["embedding_length"],
        "vocab_size": vocab_size,
        "layer_norm_epsilon": short(eps),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def gguf_extra_tensors(config: TwoTowerConfig) -> Iterator[tuple[str, Tensor]]:
    """Zeros for convolutions without a bias: llama.cpp insists on one."""
    for index, layer in enumerate(config.context.layers):
        if isinstance(layer, MambaSpec) and not layer.conv_bias:
            yield f"blk.{index}.ssm_conv1d.bias", torch.zeros(layer.conv_channels)


def add_gguf_sizes(writer: "GGUFWriter", config: TwoTowerConfig) -> None:
    """The sizes; a layer's kind follows from its feed-forward width and KV heads alone."""
    tower = config.context
    attention, mamba = tower.shared_spec(AttentionSpec), tower.shared_spec(MambaSpec)
    assert attention is not None and mamba is not None  # gguf_architecture has asked for both
    # Positions are not encoded, so this limits nothing: it is the cache it takes when not told.
    writer.add_context_length(16_384)
    writer.add_embedding_length(tower.hidden_size)
    writer.add_block_count(tower.num_layers)
    writer.add_feed_forward_length([getattr(one, "intermediate_size", 0) for one in tower.layers])
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv([getattr(one, "num_kv_heads", 0) for one in tower.layers])
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_eps(tower.norm_eps)  # each is read by some versions
    writer.add_layer_norm_rms_eps(tower.norm_eps)
    writer.add_ssm_conv_kernel(mamba.conv_width)
    writer.add_ssm_inner_size(mamba.width)
    writer.add_ssm_state_size(mamba.state_size)
    writer.add_ssm_time_step_rank(mamba.num_heads)
    writer.add_ssm_group_count(mamba.num_groups)
    if (moe := tower.shared_spec(MoESpec)) is not None:
        writer.add_expert_count(moe.num_experts)
        writer.add_expert_used_count(moe.experts_per_token)
        writer.add_expert_shared_count(1)
        writer.add_expert_feed_forward_length(moe.intermediate_size)
        writer.add_expert_shared_feed_forward_length(moe.shared_intermediate_size)
        writer.add_expert_weights_norm(moe.norm_topk_prob)
        writer.add_expert_weights_scale(moe.scaling_factor)
        if moe.latent_size is not None:
            writer.add_moe_latent_size(moe.latent_size)


class _Layers(NamedTuple):
    """The layers of a kind: a file's metadata, its tensors' names, and the layers' numbers."""

    metadata: Mapping[str, Any]
    tensors: frozenset[str]
    at: Sequence[int]

    def size(self, name: str, default: object = None) -> Any:
        """What they have in common of a value that may be one for each layer of the file."""
        each = _per_layer(self.metadata, name, default)
        found = list(dict.fromkeys(each[index] for index in self.at))
        if len(found) > 1:
            raise ValueError(
                f"{name} gives layers of a kind different sizes, {reprlib.repr(found)}, which is "
                "not supported"
            )
        return found[0]

    def has(self, name: str) -> bool:
        """Whether the first of them has a tensor."""
        return f"blk.{self.at[0]}.{name}" in self.tensors


def _layer_kinds(metadata: Mapping[str, Any]) -> list[type[LayerSpec]]:
    """The kind of each layer, without blocks of multi-token prediction, which follow the others."""
    blocks, drafts = metadata["block_count"], metadata.get("nextn_predict_layers", 0)
    if not 0 <= drafts < blocks <= MAX_LAYERS:
        raise ValueError(
            f"block_count={blocks} with nextn_predict_layers={drafts} is not supported; only 1 to "
            f"{MAX_LAYERS} blocks, and fewer of prediction"
        )
    wide = MoESpec if metadata.get("expert_count", 0) else MLPSpec
    widths = _per_layer(metadata, "feed_forward_length", 0)
    heads = _per_layer(metadata, "attention.head_count_kv", metadata["attention.head_count"])
    pairs = list(zip(widths, heads, strict=True))[: blocks - drafts]
    kinds = [wide if width else AttentionSpec if head else MambaSpec for width, head in pairs]
    if not {MambaSpec, AttentionSpec} <= {*kinds}:
        raise ValueError(
            "feed_forward_length and attention.head_count_kv make layers "
            f"{''.join(kind.symbol for kind in kinds)}; without M or * they are not supported"
        )
    return kinds


def _per_layer(metadata: Mapping[str, Any], name: str, default: object = None) -> list[Any]:
    """A value for each block: the file's list, or its one value; KeyError without a default."""
    blocks = metadata["block_count"]
    if (value := metadata.get(name, default)) is None:
        raise KeyError(name)
    if not isinstance(value, list):
        return [value] * blocks
    if len(value) != blocks:
        raise ValueError(f"{name} has {len(value)} values for {blocks} blocks; fetch it again")
    return value


def _mamba(layers: _Layers) -> dict[str, object]:
    """The fields of Mamba layers."""
    found = layers.metadata
    num_heads, width = found["ssm.time_step_rank"], found["ssm.inner_size"]
    return {
        "mamba_num_heads": num_heads,
        "mamba_head_dim": width // max(num_heads, 1),
        "ssm_state_size": found["ssm.state_size"],
        "n_groups": found["ssm.group_count"],
        "conv_kernel": found["ssm.conv_kernel"],
        "use_conv_bias": layers.has("ssm_conv1d.bias"),
    }


def _attention(layers: _Layers) -> dict[str, object]:
    """The fields of attention layers."""
    heads = layers.size("attention.head_count")
    usual = layers.metadata["embedding_length"] // max(heads, 1)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": layers.size("attention.head_count_kv", heads),
        "head_dim": layers.metadata.get("attention.key_length", usual),
        "attention_bias": layers.has("attn_q.bias"),
    }


def _mlp(layers: _Layers) -> dict[str, object]:
    """The fields of dense MLPs."""
    return {
        "intermediate_size": layers.size("feed_forward_length"),
        "mlp_bias": layers.has("ffn_up.bias"),
    }


def _experts(layers: _Layers) -> dict[str, object]:
    """The fields of mixtures of experts. A scale of 0 is none there."""
    found = layers.metadata
    return {
        "n_routed_experts": found["expert_count"],
        "num_experts_per_tok": layers.size("expert_used_count"),
        "moe_intermediate_size": layers.size("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": found["expert_shared_feed_forward_length"],
        "moe_latent_size": found.get("moe_latent_size") or None,
        "norm_topk_prob": found.get("expert_weights_norm", False),
        "routed_scaling_factor": short(found.get("expert_weights_scale", 0.0)) or 1.0,
    }


def _log(rates: Tensor) -> Tensor:
    """The logarithm whose exponential in float32 is the number again, where there is one."""
    near = rates.double().log().float()
    found = near
    for other in (torch.inf, -torch.inf):
        beside = torch.nextafter(near, torch.full_like(near, other))
        found = torch.where((found.exp() != rates) & (beside.exp() == rates), beside, found)
    return found
