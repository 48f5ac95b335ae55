"""Llama and its relatives by their config.json: what is read, and what is refused."""

import json
from pathlib import Path

import pytest

from twotower.cli.main import main
from twotower.families import FAMILIES, config_from_dict, config_to_dict
from twotower.families.feed_forward import feed_forward_from_gguf
from twotower.specs import AttentionSpec, MoESpec

LLAMA: dict[str, object] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "vocab_size": 50,
}  # fmt: skip


MOE: dict[str, object] = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 3}


def llama_refusal(**values: object) -> str:
    with pytest.raises(ValueError) as error:
        config_from_dict(LLAMA | {"num_key_value_heads": 2} | values)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"sliding_window": 512}, "sliding_window=512 is not supported; only null"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0 must be at least 1"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 4},
            "layer_types has 'full_attention', which contradicts sliding_window=4096",
        ),
        ({"is_causal": False}, "is_causal=False is not supported; only true"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 50.0}, "sliding_attention": {}}},
            "rope_parameters gives each kind of layer its own values (full_attention, sliding_",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "layer_types has 'sliding_attention', which contradicts sliding_window=None",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"] * 3 + ["chunked_attention"]},
            "layer_types has 'chunked_attention', which is not supported",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None},
            "max_window_layers=None must be of type int",
        ),
        (
            {
                "model_type": "smollm3",
                "use_sliding_window": True,
                "sliding_window": 8,
                "no_rope_layers": [0] * 4,
            },
            "a window of attention is not supported without rotary positions",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"] * 3},
            "layer_types=['full_attention', 'full_attention', 'full_attention'] contradicts "
            "num_hidden_layers=4",
        ),
        ({"layer_types": "full_attention"}, "layer_types='full_attention' contradicts num_hidden"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "missing field original_max_position"),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4,
                    "mscale": "1",
                    "original_max_position_embeddings": 8,
                }
            },
            "mscale='1' must be of type float",
        ),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type='dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "missing field factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "factor=0.0 must be a finite number above 0",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"rope_parameters": ["linear"]}, "rope_parameters=['linear'] must be an object"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "longrope"}},
            "rope_type='longrope' is not supported",
        ),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type=['linear'] is not supported"),
        ({"rope_theta": "10000"}, "rope_theta='10000' must be of type float"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be between 1 and 512"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers='4' must be of type int"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be between 1"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of"),
        ({"intermediate_size": None}, "missing field intermediate_size"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "must be a 0 (no positions) or a 1"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 2, 1]}, "must be a 0 (no positions)"),
        (MOE | {"mlp_only_layers": [4]}, "mlp_only_layers=[4] must be a list of layers, 0 to 3"),
        (MOE | {"mlp_only_layers": [[0]]}, "mlp_only_layers=[[0]] must be a list of layers"),
        (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
        (MOE | {"num_experts": None}, "missing field num_experts"),
        (MOE | {"num_experts_per_tok": 7}, "num_experts_per_tok=7 must be between 1 and 6"),
        (MOE | {"moe_intermediate_size": "8"}, "moe_intermediate_size='8' must be of type int"),
        (MOE | {"num_local_experts": 8}, "num_experts=6 contradicts num_local_experts=8"),
        (MOE | {"mlp_bias": True}, "mlp_bias=True is not supported; only false"),
        (
            MOE | {"use_sliding_window": True, "sliding_window": 8},
            "sliding_window=8 is not supported; only null",
        ),
        (
            MOE | {"mlp_only_layers": [1], "intermediate_size": None},
            "missing field intermediate_size",
        ),
        ({"eos_token_id": 50}, "eos_token_id=50 is outside the vocabulary"),
        ({"mask_token_id": 51}, "mask_token_id=51 is outside the vocabulary"),
        ({"block_configs": [1]}, "block_configs gives each layer its own values"),
    ],
)
def test_what_a_llama_cannot_have_is_refused_by_name(
    values: dict[str, object], expected: str
) -> None:
    """Silent failure: a window, scaling or activation is passed over, and texts go wrong late."""
    assert expected in llama_refusal(**values)


@pytest.mark.parametrize("verb", [["inspect"], ["plan", "--model"]], ids=" ".join)
@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_configuration_of_another_quantisation_is_refused_without_weights(
    verb: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: a file of 4 bits is shown and priced at full precision, and never loads."""
    values = LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main([*verb, str(tmp_path / name)]) == 2
    assert "quant_method='awq' is not supported" in capsys.readouterr().err


def test_the_length_before_scaling_stands_inside_or_outside() -> None:
    """Silent failure: as in transformers, the one outside counts; the scaling would begin elsewhere
    and long texts go wrong.
    """
    inside = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    for scaling, outside, expected in (
        (inside, {"max_position_embeddings": 512}, 512),
        (inside, {"max_position_embeddings": 512, "original_max_position_embeddings": 64}, 64),
        (
            inside | {"original_max_position_embeddings": 128},
            {"original_max_position_embeddings": 64},
            64,
        ),
    ):
        rope = config_from_dict(LLAMA | {"rope_scaling": scaling} | outside).context.rotary
        assert rope is not None and rope[0].original_max_positions == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "mistral"}, [4096] * 4),
        ({"model_type": "mistral", "use_sliding_window": False, "sliding_window": 8}, [8] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "qwen2", "use_sliding_window": True}, [None] * 4),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3},
            [None] * 3 + [4096],
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8,
             "layer_types": ["full_attention", "sliding_attention"] * 2},
            [None, 8] * 2,
        ),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8,
             "vocab_size": 128005},
            [None] * 3 + [8],
        ),
    ],
)  # fmt: skip
def test_windows_are_those_of_transformers(
    values: dict[str, object], expected: list[int | None]
) -> None:
    """Silent failure: a window that is not asked for, or is, hides the beginning of a long text."""
    config = config_from_dict(LLAMA | {"num_key_value_heads": 2} | values)
    assert [one.window for one in config.context.layers_of(AttentionSpec)] == expected
    assert config_from_dict(config_to_dict(config)) == config


def test_fields_that_mean_nothing_are_passed_over() -> None:
    config = config_from_dict(
        LLAMA | {"model_type": "qwen2", "sliding_window": 32768, "num_key_value_heads": None}
    )
    assert config.context.pattern == "*-" * 4
    assert config.mask_token_id == 50 and config.has_own_mask
    assert config.eos_token_ids == () and config_from_dict(LLAMA).eos_token_ids == (2,)
    assert config_from_dict(LLAMA | {"eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4},
        {"type": "yarn", "beta_fast": 16, "mscale": 2, "mscale_all_dim": 0.5, "truncate": False},
    ],
)
def test_a_llama_survives_its_own_file(model_type: str, scaling: dict[str, object]) -> None:
    scaling |= {"factor": 8, "original_max_position_embeddings": 64}
    kept = {"num_key_value_heads": 2, "head_dim": 16, "rope_scaling": scaling, "rope_theta": 5e5}
    kept |= {"vocab_size": 128005}
    config = config_from_dict(LLAMA | kept | {"model_type": model_type, "bos_token_id": 3})
    assert config_from_dict(config_to_dict(config)) == config
    assert config.context.rotary is not None and config.context.rotary[0].factor == 8


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"sliding_window": 4096, "mlp_only_layers": None}, "*E*E*E*E"),
        ({"num_experts": None, "num_local_experts": 6, "intermediate_size": None}, "*E*E*E*E"),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, "*-*E*-*-"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "*-*-*-*-"),
        ({"num_experts": 0}, "*-*-*-*-"),
    ],
)
def test_which_blocks_have_experts(values: dict[str, object], pattern: str) -> None:
    """Silent failure: a dense block is read as experts, or the file that we write says so."""
    config = config_from_dict(LLAMA | MOE | values)
    assert config.context.pattern == pattern
    assert config_from_dict(config_to_dict(config)) == config
    for moe in config.context.layers_of(MoESpec):
        assert (moe.num_experts, moe.experts_per_token, moe.intermediate_size) == (6, 3, 768)
        assert not moe.norm_topk_prob and moe.gated and moe.router == "softmax"


def test_experts_that_llama_cpp_would_compute_otherwise_are_not_exported() -> None:
    """Silent failure: it norms the weights of the chosen experts, whatever the model says."""
    family = FAMILIES["qwen3_moe"]
    with pytest.raises(ValueError, match="norm_topk_prob=false cannot be exported"):
        family.gguf_architecture(config_from_dict(LLAMA | MOE))
    with pytest.raises(ValueError, match="mlp_only_layers, decoder_sparse_step cannot be exp"):
        family.gguf_architecture(config_from_dict(LLAMA | MOE | {"mlp_only_layers": [0]}))
    assert family.gguf_architecture(config_from_dict(LLAMA | MOE | {"norm_topk_prob": True}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"expert_weights_norm": False}, "expert_weights_norm=False is not supported; only True"),
        ({"expert_shared_count": 1}, "expert_shared_count=1 is not supported; only 0"),
        ({"expert_feed_forward_length": 20}, None),
        ({}, None),
    ],
)
def test_experts_of_a_gguf_file(values: dict[str, object], expected: str | None) -> None:
    """Silent failure: a file of other weights of the experts, or without their width."""
    found: dict[str, object] = {
        "expert_count": 6, "expert_used_count": 3, "feed_forward_length": 60,
    }  # fmt: skip
    if expected is not None:
        with pytest.raises(ValueError, match=expected):
            feed_forward_from_gguf(found | values, frozenset(), has_experts=True)
        return
    read = feed_forward_from_gguf(found | values, frozenset(), has_experts=True)
    assert read == {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="expert_count=6 is not supported; only 0"):
        feed_forward_from_gguf(found, frozenset(), has_experts=False)
