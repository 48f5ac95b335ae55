"""Named model sizes for training from scratch; the vocabulary comes from the data's tokenizer."""

from twotower.config import TwoTowerConfig
from twotower.families import config_from_dict

_PRESETS: dict[str, dict[str, object]] = {
    # For tests: seconds on one core.
    "tiny": {
        "hybrid_override_pattern": "M*-",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "conv_kernel": 4,
        "intermediate_size": 64,
    },
    # The first shipped model: about 2.5M parameters a tower. Many attention layers, because copying
    # names and numbers from the prompt is what a small model learns last.
    "small": {
        "hybrid_override_pattern": "M*-M*-M*-M*-",
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_num_heads": 12,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 1,
        "conv_kernel": 4,
        "intermediate_size": 512,
    },
    # Every kind of layer but the dense MLP: about 1.2M parameters a tower, 0.8M of them active.
    "moe": {
        "hybrid_override_pattern": "M*EM*E",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 1,
        "conv_kernel": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "moe_shared_expert_intermediate_size": 256,
    },
}
PRESET_NAMES = tuple(_PRESETS)


def preset_config(name: str, vocab_size: int) -> TwoTowerConfig:
    """The configuration called `name` for a vocabulary."""
    return config_from_dict(_PRESETS[name] | {"vocab_size": vocab_size})
