"""The released Nemotron-H models by what their config.json says of sizes."""

MAMBA_128 = {"mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4}
# The released config.json of each model, without what changes no size. Sources: the models' cards
# and configurations; Nemotron-H: arXiv 2504.03624, Nano 2: 2508.14444, Nemotron 3: 2512.20856.
PUBLISHED: dict[str, dict[str, object]] = {
    "Nemotron-H-4B": {
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "hidden_size": 3072, "intermediate_size": 12288, "mamba_num_heads": 112,
        "num_attention_heads": 32, "num_key_value_heads": 8, "attention_head_dim": 128,
    },
    "Nemotron-H-8B": {
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "hidden_size": 4096, "intermediate_size": 21504, "mamba_num_heads": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "attention_head_dim": 128,
    },
    "Nemotron-H-56B": {
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
        "M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "hidden_size": 8192, "intermediate_size": 32768, "mamba_num_heads": 256,
        "ssm_state_size": 256, "num_attention_heads": 64, "num_key_value_heads": 8,
        "attention_head_dim": 128,
    },
    "Nemotron-Nano-9B-v2": {
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        "hidden_size": 4480, "intermediate_size": 15680, "mamba_num_heads": 128,
        "mamba_head_dim": 80, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "Nemotron-3-Nano-30B-A3B": {
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "hidden_size": 2688, "mamba_num_heads": 64, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "n_routed_experts": 128,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5,
    },
    "Nemotron-3-Super-120B-A12B": {
        "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
        "EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        "hidden_size": 4096, "mamba_num_heads": 128, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "n_routed_experts": 512,
        "num_experts_per_tok": 22, "moe_intermediate_size": 2688, "moe_latent_size": 1024,
        "moe_shared_expert_intermediate_size": 5376, "routed_scaling_factor": 5.0,
    },
    "Nemotron-3-Ultra-550B-A55B": {
        "layers_block_type": [
            {"M": "mamba", "E": "moe", "*": "attention"}[symbol]
            for symbol in "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*"
            "EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
        ],
        "num_hidden_layers": None,
        "hidden_size": 8192, "mamba_num_heads": 256, "num_attention_heads": 64,
        "num_key_value_heads": 2, "head_dim": 128, "n_routed_experts": 512,
        "num_experts_per_tok": 22, "moe_intermediate_size": 5120, "moe_latent_size": 2048,
        "moe_shared_expert_intermediate_size": 10240, "routed_scaling_factor": 5.0,
    },
}  # fmt: skip
