"""The configuration: what a config.json means, and one clear line for what it cannot mean."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.families import config_from_dict, config_to_dict, read_config
from twotower.specs import MambaSpec, MoESpec

RELEASED = json.loads((Path(__file__).parents[1] / "golden/case_01/config.json").read_text())
TRANSFORMERS = {name: v for name, v in RELEASED.items() if name != "hybrid_override_pattern"} | {
    "layers_block_type": [
        "linear_attention",
        "moe",
        "linear_attention",
        "full_attention",
        "moe",
        "linear_attention",
        "full_attention",
        "moe",
    ],
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
}


def changed(**values: object) -> dict[str, object]:
    return RELEASED | values


def without(*names: str) -> dict[str, object]:
    return {name: value for name, value in RELEASED.items() if name not in names}


def message(values: dict[str, object]) -> str:
    with pytest.raises(ValueError) as error:
        config_from_dict(values)
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


def test_released_fields_are_read() -> None:
    config = config_from_dict(RELEASED)
    mamba, moe = config.context.layers[0], config.context.layers[1]
    assert isinstance(mamba, MambaSpec) and isinstance(moe, MoESpec)
    assert config.context.pattern == config.denoiser.pattern == "MEM*EM*E"
    assert moe.scaling_factor == 2.5
    assert mamba.conv_channels == 16 * 8 + 2 * 2 * 16
    assert (config.mask_token_id, config.block_size) == (3, 16)
    assert config.eos_token_ids == (2,)


def test_our_own_fields_and_lists_of_eos_are_read() -> None:
    config = config_from_dict(changed(mask_token_id=7, block_size=8, eos_token_id=[2, 5]))
    assert (config.mask_token_id, config.block_size, config.eos_token_ids) == (7, 8, (2, 5))
    assert config_from_dict(changed(eos_token_id=None)).eos_token_ids == ()


def test_what_transformers_writes_means_the_same() -> None:
    """Guards against layers of another kind: names of block types differ between versions."""
    released = config_from_dict(RELEASED)
    assert config_from_dict(TRANSFORMERS) == released
    older = [
        {"linear_attention": "mamba", "full_attention": "attention"}.get(k, k)
        for k in TRANSFORMERS["layers_block_type"]  # type: ignore[attr-defined]
    ]
    assert config_from_dict(TRANSFORMERS | {"layers_block_type": older}) == released
    renamed = without("n_routed_experts", "conv_kernel") | {
        "num_local_experts": 8,
        "mamba_d_conv": 4,
    }
    assert config_from_dict(renamed) == released


@pytest.mark.parametrize("pattern", ["MEM*EM*E", "M", "*-"])
def test_a_configuration_survives_its_own_dictionary(pattern: str) -> None:
    config = config_from_dict(
        changed(hybrid_override_pattern=pattern, num_hidden_layers=len(pattern))
    )
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_sizes_of_absent_layer_kinds_are_not_asked_for() -> None:
    """A dense model's file may leave experts out, or set them to 0."""
    values = changed(
        hybrid_override_pattern="M-", num_hidden_layers=2, n_routed_experts=0, n_group=0
    )
    values = {n: v for n, v in values.items() if not n.startswith("moe_")}
    assert config_from_dict(values).context.num_layers == 2


@pytest.mark.parametrize(
    "name",
    [
        "hybrid_override_pattern",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "head_dim",
        "mamba_num_heads",
        "ssm_state_size",
        "n_groups",
        "conv_kernel",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    ],
)
def test_a_missing_field_is_named(name: str) -> None:
    """Guards against a default of another model: 8 groups of 16 load like 16 groups of 8."""
    assert f"missing field {name}" in message(without(name))
    assert f"missing field {name}" in message(changed(**{name: None}))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hybrid_override_pattern", "MEM*EMXE", "unknown symbol 'X' at layer 6"),
        ("hybrid_override_pattern", "MEM*EM*", "7 symbols but num_hidden_layers=8"),
        ("hybrid_override_pattern", ["M"], "hybrid_override_pattern=['M'] must be of type str"),
        ("num_hidden_layers", 9, "8 symbols but num_hidden_layers=9"),
        ("num_hidden_layers", "8", "num_hidden_layers='8' must be of type int"),
        ("hidden_size", 0, "hidden_size=0 must be between 1 and"),
        ("hidden_size", 10**30, "must be between 1 and"),
        ("hidden_size", True, "hidden_size=True must be of type int"),
        ("hidden_size", 64.0, "hidden_size=64.0 must be of type int"),
        ("norm_topk_prob", 1, "norm_topk_prob=1 must be of type bool"),
        ("layer_norm_epsilon", -1e-5, "layer_norm_epsilon=-1e-05 must be"),
        ("layer_norm_epsilon", float("nan"), "layer_norm_epsilon=nan must be"),
        ("layer_norm_epsilon", True, "layer_norm_epsilon=True must be of type float"),
        ("routed_scaling_factor", float("inf"), "routed_scaling_factor=inf must be"),
        ("num_key_value_heads", 3, "num_attention_heads=4 must be a multiple of"),
        ("n_groups", 3, "mamba_num_heads=16 must be a multiple of n_groups=3"),
        ("n_group", 0, "n_routed_experts=8 must be a multiple of n_group=0"),
        ("topk_group", 2, "topk_group=2 must be between 1 and 1"),
        ("num_experts_per_tok", 9, "num_experts_per_tok=9 must be between 1 and 8"),
        ("mamba_hidden_act", "gelu", 'only "silu"'),
        ("mlp_hidden_act", "silu", 'only "relu2"'),
        ("mlp_bias", True, "mlp_bias=true with E layers is not supported"),
        ("sliding_window", 128, "sliding_window=128 is not supported"),
        ("time_step_limit", [0.001, 0.1], "time_step_limit=[0.001, 0.1] is not supported"),
        ("time_step_limit", "x\ny", "is not supported"),
        ("mask_token_id", 129, "mask_token_id=129 is outside the vocabulary"),
        ("eos_token_id", [2, 999], "eos_token_id=999 is outside the vocabulary"),
        ("eos_token_id", [2, True], "must be a token id or null"),
        ("block_size", 0, "block_size=0 must be between 1 and"),
    ],
)
def test_a_bad_value_is_one_clear_line(name: str, value: object, expected: str) -> None:
    values = changed(**{name: value})
    values.pop("norm_eps")  # says layer_norm_epsilon again
    assert expected in message(values)


def test_an_unknown_block_type_is_named() -> None:
    assert "unknown entry 'rwkv'" in message(TRANSFORMERS | {"layers_block_type": ["rwkv"]})
    assert "unknown entry ['moe']" in message(TRANSFORMERS | {"layers_block_type": [["moe"]]})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b'{"hidden_size": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"{}", "config.json: model_type is missing; supported are nemotron_h"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read_config(tmp_path)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_config(tmp_path)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([*RELEASED.values(), 0, 1, -1, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
NAMES = sorted(
    {
        *config_to_dict(config_from_dict(RELEASED)),
        "layers_block_type",
        "time_step_limit",
        "mamba_d_conv",
        "reads",
        "moe_latent_size",
        "model_type",
    }
)


@given(st.dictionaries(st.sampled_from(NAMES), JUNK, min_size=1, max_size=4), st.booleans())
def test_junk_never_raises_anything_but_a_one_line_value_error(
    junk: dict[str, object], alone: bool
) -> None:
    """Guards against a traceback out of a damaged file, or ZeroDivisionError from a size of 0."""
    try:
        config_from_dict(junk if alone else RELEASED | junk)
    except ValueError as error:
        assert "\n" not in str(error)
