"""A tiny Qwen3-MoE by its config.json."""

from twotower import TwoTowerConfig
from twotower.families import config_from_dict

SIZES: dict[str, object] = {
    "model_type": "qwen3_moe", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    "norm_topk_prob": True, "mlp_only_layers": [1], "bos_token_id": None, "eos_token_id": 66,
}  # fmt: skip
"""All blocks but the second have experts."""


def tiny_config(**changes: object) -> TwoTowerConfig:
    """With other values where some are given."""
    return config_from_dict(SIZES | changes)
