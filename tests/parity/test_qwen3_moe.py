"""Qwen3-MoE in every room that knows experts, against what `transformers` computes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tiny_models import random_model
from twotower.checkpoint import convert, export_gguf, gguf_reader, load_checkpoint

transformers = pytest.importorskip("transformers")

VOCABULARY = 67


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Their model, and a folder for each of the two layouts in which it can be saved."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8,
        num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True, mlp_only_layers=[1],
        bos_token_id=None, eos_token_id=66, pad_token_id=None,
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = transformers.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_((0.3 if parameter.dim() > 1 else 0.1) * torch.randn(parameter.shape))
    each, stacked = (tmp_path_factory.mktemp(name) for name in ("each", "stacked"))
    theirs.save_pretrained(each)
    theirs.save_pretrained(stacked, save_original_format=False)
    return theirs, each, stacked


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY - 1, shape, generator=torch.Generator().manual_seed(seed))


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_both_layouts_are_the_same_model(pair: Any) -> None:
    """Silent failure: gate and up in each other's place, or the rows of one for both."""
    _, each, stacked = pair
    first = "model.layers.0.mlp.experts."
    assert f"{first}7.up_proj.weight" in tensor_names(each)
    assert f"{first}gate_up_proj" in tensor_names(stacked)
    one, other = (load_checkpoint(folder, towers="context") for folder in (each, stacked))
    assert one.config.context == other.config.context
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_stack_of_odd_height_is_refused(pair: Any, tmp_path: Path) -> None:
    """Silent failure: the last row of a tensor of gates and ups belongs to nobody."""
    from safetensors.torch import load_file, save_file

    _, _, stacked = pair
    tensors = load_file(stacked / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = torch.cat([tensors[name], tensors[name][:, :1]], dim=1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((stacked / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"1 unexpected: .*gate_up_proj"):
        load_checkpoint(tmp_path, towers="context")


@pytest.mark.parametrize("storage", ["memory", "mmap"])
def test_experts_may_stay_in_their_files(pair: Any, storage: Any) -> None:
    """Silent failure: an expert's gate is a neighbour's, which random texts do not show."""
    theirs, each, _ = pair
    model = load_checkpoint(each, towers="context", expert_storage=storage)
    tokens = ids(2, 20)
    torch.testing.assert_close(
        model.context_logits(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_mapped_says_what_to_do(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: halves of a tensor, or a GGUF file, are read as another tensor's bytes."""
    _, _, stacked = pair
    with pytest.raises(ValueError, match=r"gate_up_proj cannot be mapped as the file keeps it"):
        load_checkpoint(stacked, towers="context", expert_storage="mmap")
    convert(stacked, tmp_path / "anew", "backbone")
    load_checkpoint(tmp_path / "anew", towers="context", expert_storage="mmap")
    monkeypatch.setattr(gguf_reader, "_CACHE", tmp_path / "cache")
    config = load_checkpoint(stacked, towers="context").config
    layers = config.context.layers[:2]  # llama.cpp has no block without experts
    tower = dataclasses.replace(config.context, layers=layers)
    config = config.replace(context=tower, denoiser=tower, reads=(0, 1))
    export_gguf(random_model(config), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"exps\.weight\[0\] cannot be mapped as the file keeps"):
        load_checkpoint(tmp_path / "model.gguf", towers="context", expert_storage="mmap")
