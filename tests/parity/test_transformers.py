"""The context tower against transformers' own NemotronHForCausalLM, in both directions.

Its prefill clamps the step size to at least `time_step_min`, which no other code of this model
does. The export writes a value there that no step reaches; a model that transformers made gets the
limit taken away before the comparison. With that both agree to 5e-5.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from twotower.checkpoint import convert, export_transformers, load_checkpoint
from twotower.checkpoint.files import shipped_folder
from twotower.families import config_from_dict, config_to_dict, read_config
from twotower.tokenizer import load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers", minversion="5")

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4  # float32 sums in another order, on any processor
SIZES = {
    "hidden_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "routed_scaling_factor": 2.5,
}


def recorded_prompt(case: str) -> torch.Tensor:
    """40 tokens without a router decision near a tie."""
    golden = json.loads((GOLDEN / case / "golden.json").read_text())
    return torch.tensor([golden["prompts"]["p40"]])


@torch.no_grad()
def difference(theirs: nn.Module, path: Path, tokens: torch.Tensor) -> float:
    """Largest absolute difference of the logits."""
    ours = load_checkpoint(path, towers="context")
    return (theirs(tokens).logits - ours.context_logits(tokens)).abs().max().item()


def load_theirs(path: Path) -> nn.Module:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report  # nothing missing, unexpected or misshapen
    assert type(model).__name__ == "NemotronHForCausalLM"
    loaded: nn.Module = model.eval()
    return loaded


@pytest.mark.parametrize("case", ["case_01", "case_02", "case_03"])
def test_transformers_loads_the_export(tmp_path: Path, case: str) -> None:
    """Guards against tensors that transformers fills with random values, and its step clamp."""
    export_transformers(load_checkpoint(GOLDEN / case), tmp_path)
    theirs = load_theirs(tmp_path)
    assert difference(theirs, GOLDEN / case, recorded_prompt(case)) < TOLERANCE


def test_a_prompt_begins_there_as_here(tmp_path: Path) -> None:
    """Silent failure: our tokenizers' bos stood in no file, and transformers wrote another text."""
    convert(shipped_folder(), tmp_path / "shipped", "transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "shipped")
    ours, again = load_tokenizer(shipped_folder()), load_tokenizer(tmp_path / "shipped")
    for text in ("Tom has 3 apples.", "<eos> ", "a"):
        assert ours.encode_prompt(text) == again.encode_prompt(text)
        assert theirs(text, split_special_tokens=True).input_ids == ours.encode_prompt(text)
    told = train_tokenizer(["abc"] * 3, vocab_size=300).with_roles({}, adds_bos=False)
    assert told.json_with_bos() is None and again.json_with_bos() is None


def test_the_step_limit_matters(tmp_path: Path) -> None:
    """Pins the reason for `time_step_min` in the export: with the original value logits differ."""
    export_transformers(load_checkpoint(GOLDEN / "case_01"), tmp_path)
    theirs = load_theirs(tmp_path)
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            assert module.time_step_limit[0] < 1e-20
            module.time_step_limit = (0.1, float("inf"))
    assert difference(theirs, GOLDEN / "case_01", recorded_prompt("case_01")) > 10 * TOLERANCE


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("latent", [None, 12])
def test_what_transformers_saves_loads_here(
    tmp_path: Path, original_format: bool, tied: bool, latent: int | None
) -> None:
    """Guards both of its layouts: backbone.* with single experts, model.* with stacked ones.

    transformers ignores tie_word_embeddings for this architecture: the head has its own values.
    """
    config = transformers.NemotronHConfig(
        hybrid_override_pattern="M*E-ME", tie_word_embeddings=tied, moe_latent_size=latent, **SIZES
    )
    torch.manual_seed(3)
    theirs = transformers.NemotronHForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if value.dim() > 1:
                value.normal_(std=0.2)
            elif "correction" in name:
                value.uniform_(0, 0.1)
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    theirs.save_pretrained(tmp_path, save_original_format=original_format)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        prefix = "backbone." if original_format else "model."
        assert any(name.startswith(prefix) for name in file.keys())  # noqa: SIM118
    tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    assert difference(theirs, tmp_path, tokens) < TOLERANCE
    assert load_checkpoint(tmp_path).config.context.pattern == "M*E-ME"


def test_the_export_refuses_what_transformers_cannot_represent(tmp_path: Path) -> None:
    from twotower.model.two_tower import TwoTower

    values = config_to_dict(read_config(GOLDEN / "case_03")) | {"attention_bias": True}
    with pytest.raises(ValueError, match="attention_bias=true cannot be exported"):
        export_transformers(TwoTower(config_from_dict(values), "context"), tmp_path)
