"""Families: published models by their config.json, and what is refused before anything loads."""

import re
from pathlib import Path

import pytest
import torch

from published import MAMBA_128, PUBLISHED
from tiny_models import tiny_config
from twotower.checkpoint.inspect import describe_config
from twotower.cli.main import main
from twotower.config import TowerConfig, TwoTowerConfig
from twotower.families import FAMILIES, config_from_dict, config_to_dict
from twotower.specs import MoESpec

# Source: the models' config.json.
QWEN3_MOE: dict[str, object] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 128,
    "num_key_value_heads": 4, "rope_theta": 1e6, "rope_scaling": None, "sliding_window": None,
    "use_sliding_window": False, "max_window_layers": 48, "attention_bias": False,
    "bos_token_id": 151643, "eos_token_id": 151645, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = PUBLISHED | {
    "Qwen3-30B-A3B": QWEN3_MOE | {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32,
    },
    "Qwen3-235B-A22B": QWEN3_MOE | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 94, "num_attention_heads": 64, "max_window_layers": 94,
    },
}  # fmt: skip


def published(name: str) -> TwoTowerConfig:
    shared = {"model_type": "nemotron_h", "vocab_size": 131072, **MAMBA_128}
    return config_from_dict(shared | MODELS[name])


@pytest.mark.parametrize(
    ("name", "total", "active", "layers"),
    [
        ("Nemotron-H-8B", 8.10e9, 8.10e9, 52),
        ("Nemotron-H-56B", 56e9, 56e9, 118),
        ("Nemotron-Nano-9B-v2", 8.89e9, 8.89e9, 56),
        ("Nemotron-3-Nano-30B-A3B", 31.6e9, 3.6e9, 52),
        ("Nemotron-3-Super-120B-A12B", 120.6e9, 12.7e9, 88),
        ("Nemotron-3-Ultra-550B-A55B", 550e9, 55e9, 108),
        ("Qwen3-30B-A3B", 30.5e9, 3.3e9, 96),
        ("Qwen3-235B-A22B", 235e9, 22e9, 188),
    ],
)
def test_published_totals(name: str, total: float, active: float, layers: int) -> None:
    """Silent failure: a size is read under another name and the model is of another width."""
    config = published(name)
    tower = describe_config(config, name).towers["context"]
    assert config.context.num_layers == layers
    assert tower.total == pytest.approx(total, rel=0.012)
    assert tower.active == pytest.approx(active, rel=0.05)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("Nemotron-H-8B", 8_100_852_736),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen3-235B-A22B", 235_093_634_560),
    ],
)
def test_a_model_has_its_published_parameters_to_the_last_one(name: str, total: int) -> None:
    assert describe_config(published(name), name).towers["context"].total == total


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_survives_its_own_file(name: str) -> None:
    config = published(name)
    assert config_from_dict(config_to_dict(config)) == config


def test_a_backbone_of_this_family_has_no_mask_token() -> None:
    """Guards an ordinary token 3 of a foreign vocabulary, which would be refused in prompts and
    never written. The released two-tower model alone leaves its mask, 3, out of its file.
    """
    values = config_to_dict(tiny_config())
    del values["mask_token_id"]
    for architecture, mask in (
        ("NemotronHTwoTowerForCausalLM", 3),
        ("NemotronHForCausalLM", tiny_config().vocab_size),
    ):
        config = config_from_dict(values | {"architectures": [architecture]})
        assert config.mask_token_id == mask
        named = values | {"architectures": [architecture], "mask_token_id": 7}
        assert config_from_dict(named).mask_token_id == 7


def refusal(**values: object) -> str:
    """The one line that refuses the tiny configuration with other values."""
    with pytest.raises(ValueError) as error:
        config_from_dict(config_to_dict(tiny_config()) | values)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_next", "gpt2", "mamba2", 7, None])
def test_an_unknown_model_type_is_refused_by_its_name(model_type: object) -> None:
    """Silent failure: a Qwen file was read as layers of attention without MLPs."""
    text = refusal(model_type=model_type, hybrid_override_pattern="M*E-M*")
    assert f"supported are {', '.join(FAMILIES)}" in text
    assert ("is missing" if model_type is None else repr(model_type)) in text


@pytest.mark.parametrize(
    "verb",
    [
        ["inspect", "MODEL"],
        ["plan", "--model", "MODEL", "--hardware", "h100-sxm"],
        ["generate", "--model", "MODEL", "Hello"],
        ["generate", "--model", "MODEL", "--input", "OUT"],
        ["chat", "--model", "MODEL"],
        ["serve", "--model", "MODEL"],
        ["convert", "MODEL", "OUT"],
        ["evaluate", "--model", "MODEL"],
        ["bench", "--model", "MODEL"],
        ["train", "denoiser", "--init", "MODEL", "--data", "OUT", "--out", "OUT"],
        ["train", "backbone", "--config", "MODEL/config.json", "--data", "OUT", "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_every_verb_refuses_an_unknown_model_type_first(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: a verb says that a file or field is missing, and hides the real reason."""
    (tmp_path / "config.json").write_text('{"model_type": "falcon_h1", "hidden_size": 64}')
    places = {"MODEL": str(tmp_path), "OUT": str(tmp_path / "out")}
    arguments = [re.sub("MODEL|OUT", lambda found: places[found[0]], word) for word in verb]
    assert main(arguments) == 2
    assert "model_type 'falcon_h1' is not supported; supported are " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"layers_block_type": ["mamba", "moe"]}, "contradicts layers_block_type"),
        ({"is_causal": False}, "is_causal=False is not supported; only true"),
        ({"attention_head_dim": 16}, "head_dim=8 contradicts attention_head_dim=16"),
        ({"mamba_d_conv": 3}, "conv_kernel=4 contradicts mamba_d_conv=3"),
        ({"block_configs": [{}]}, "block_configs gives each layer its own values"),
        ({"moe_widths": [1, 2, 3, 4, 5, 6]}, "moe_widths gives each layer its own values"),
        ({"moe_latent_size": 0}, "moe_latent_size=0 must be between"),
        (
            {"moe_shared_expert_intermediate_size": 0},
            "moe_shared_expert_intermediate_size=0 is not supported",
        ),
        ({"reads": [0, 9]}, r"reads=[0, 9] must be a list of layers of the context tower, 0 to 5"),
        ({"reads": []}, "reads=[] must be a list"),
        ({"hybrid_override_pattern": "M" * 20_000, "num_hidden_layers": None}, "number of layers"),
        ({"n_routed_experts": 2**20}, "1048576 routed experts"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(
    values: dict[str, object], expected: str
) -> None:
    assert expected in refusal(**values)


def test_a_denoiser_may_read_some_layers_only() -> None:
    config = config_from_dict(config_to_dict(tiny_config()) | {"reads": [1, 5]})
    assert config.denoiser.pattern == "**" and config.reads == (1, 5)
    assert config_to_dict(config)["reads"] == [1, 5]
    assert "reads" not in config_to_dict(tiny_config())


def test_a_denoiser_layer_must_be_able_to_read_its_state() -> None:
    tower = tiny_config().context
    other = TowerConfig(hidden_size=16, vocab_size=41, layers=tower.layers[1:2])
    with pytest.raises(ValueError, match=r"denoiser layer 0 \(attention\) cannot read .* layer 0"):
        TwoTowerConfig(family="nemotron_h", context=tower, denoiser=other, reads=(0,))


def test_latent_experts_share_two_projections() -> None:
    """Silent failure: router or shared expert get the latent hidden states."""
    from twotower.layers.moe import MoE

    spec = MoESpec(
        num_experts=3, experts_per_token=3, intermediate_size=5, shared_intermediate_size=4,
        latent_size=2,
    )  # fmt: skip
    moe = MoE(6, spec).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    narrow = x @ moe.fc1_latent_proj.weight.T  # type: ignore[operator, union-attr]
    scores = torch.sigmoid(x @ moe.gate.weight.T)
    scores = scores / scores.sum(1, keepdim=True)
    routed = sum(
        scores[:, [e]]
        * ((narrow @ moe.experts.up_proj[e].T).relu() ** 2 @ moe.experts.down_proj[e].T)
        for e in range(3)
    )
    expected = routed @ moe.fc2_latent_proj.weight.T + moe.shared_experts(x)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(moe(x), expected, rtol=1e-6, atol=1e-6)
