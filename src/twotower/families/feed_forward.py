"""How files spell a block's MLP, or its experts: config.json of Qwen3-MoE, and GGUF.

Blocks without experts have one MLP for all. Source: transformers 5, Qwen3MoeConfig; llama.cpp's
qwen3moe, which has experts in every block and norms their weights, whatever a file says.
"""

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twotower.config import TowerConfig
from twotower.families.fields import Values, read_spec, refuse, require, typed, write_spec
from twotower.families.gguf_metadata import require_supported
from twotower.specs import LayerSpec, MLPSpec, MoESpec

if TYPE_CHECKING:
    from gguf import GGUFWriter

_MLP = {"intermediate_size": "intermediate_size", "bias": "mlp_bias"}
_MOE = {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "intermediate_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
}
EXPERT_DEFAULTS: Mapping[str, object] = {  # what config.json means where it is silent
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": False, "decoder_sparse_step": 1,
}  # fmt: skip
_GGUF_DENSE = {"expert_count": 0}
_GGUF_EXPERTS = {  # what llama.cpp computes, whatever another file says
    "expert_shared_count": 0, "expert_weights_norm": True, "expert_weights_scale": 1.0,
}  # fmt: skip


def read_feed_forward(values: Values, num_blocks: int, has_experts: bool) -> list[LayerSpec]:
    """The MLP of each block, or its experts; ValueError (one line) for what is not supported."""
    dense = set(range(num_blocks)) if not has_experts else _dense_blocks(values, num_blocks)
    if has_experts:
        refuse(values, {"mlp_bias": False})
    mlp = read_spec(MLPSpec, values, _MLP, gated=True) if dense else None
    moe = None
    if len(dense) < num_blocks:
        moe = read_spec(
            MoESpec, values, _MOE, shared_intermediate_size=0, router="softmax", gated=True
        )
    found = [mlp if block in dense else moe for block in range(num_blocks)]
    return [one for one in found if one is not None]


def _dense_blocks(values: Values, num_blocks: int) -> set[int]:
    """The blocks without experts."""
    names = ["num_experts", "decoder_sparse_step"]
    require(values, names)
    count, step = (typed(name, values[name], int) for name in names)
    assert isinstance(count, int) and isinstance(step, int)
    if step < 1:
        raise ValueError(f"config.json: decoder_sparse_step={step} must be at least 1")
    named = values.get("mlp_only_layers", [])
    if not isinstance(named, list) or any(one not in range(num_blocks) for one in named):
        raise ValueError(
            f"config.json: mlp_only_layers={reprlib.repr(named)} must be a list of layers, 0 to "
            f"{num_blocks - 1}"
        )
    return {i for i in range(num_blocks) if i in named or count == 0 or (i + 1) % step}


def write_feed_forward(tower: TowerConfig, has_experts: bool) -> dict[str, object]:
    """The inverse."""
    blocks = tower.layers[1::2]
    mlp, moe = tower.shared_spec(MLPSpec), tower.shared_spec(MoESpec)
    fields = {} if mlp is None else write_spec(mlp, _MLP)
    if has_experts:
        dense = [i for i, one in enumerate(blocks) if isinstance(one, MLPSpec)]
        fields |= {"num_experts": 0} if moe is None else write_spec(moe, _MOE)
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return fields


def feed_forward_from_gguf(
    found: Mapping[str, Any], tensors: frozenset[str], has_experts: bool
) -> dict[str, object]:
    """The fields of config.json from a GGUF file's metadata, without its architecture's name."""
    require_supported(found, _GGUF_EXPERTS if has_experts else _GGUF_DENSE)
    if not has_experts:
        width = found["feed_forward_length"]
        return {"intermediate_size": width, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    used = found["expert_used_count"]
    width = found.get("expert_feed_forward_length") or found["feed_forward_length"] // max(used, 1)
    return {
        "num_experts": found["expert_count"],
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }


def refuse_gguf_feed_forward(tower: TowerConfig, has_experts: bool) -> None:
    """ValueError (one line) where llama.cpp computes other blocks."""
    if not has_experts:
        return
    if tower.layers_of(MLPSpec):
        raise ValueError(
            "mlp_only_layers, decoder_sparse_step cannot be exported: llama.cpp has experts in "
            "every layer in this family"
        )
    if (moe := tower.shared_spec(MoESpec)) is not None and not moe.norm_topk_prob:
        raise ValueError(
            "norm_topk_prob=false cannot be exported: llama.cpp norms the weights of the chosen "
            "experts in this family"
        )


def add_gguf_feed_forward(writer: "GGUFWriter", tower: TowerConfig) -> None:
    """The metadata."""
    if (mlp := tower.shared_spec(MLPSpec)) is not None:
        writer.add_feed_forward_length(mlp.intermediate_size)
    if (moe := tower.shared_spec(MoESpec)) is not None:
        writer.add_expert_count(moe.num_experts)
        writer.add_expert_used_count(moe.experts_per_token)
        writer.add_expert_feed_forward_length(moe.intermediate_size)
