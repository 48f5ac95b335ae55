"""Qwen3-MoE's files in every layout and precision, against what `transformers` computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tiny_models import random_model
from tiny_qwen3_moe import SIZES, tiny_config
from twotower.checkpoint import convert, describe, export_gguf, gguf_reader, load_checkpoint
from twotower.checkpoint.load import load_quantised
from twotower.kernels.quantised import dequantise
from twotower.model.precision import Scheme, matrix_at, stacks

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Their model, and a folder for each of the two layouts in which it can be saved."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, attn_implementation="eager", experts_implementation="eager"
    )
    torch.manual_seed(3)
    theirs = transformers.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_((0.3 if parameter.dim() > 1 else 0.1) * torch.randn(parameter.shape))
    each, stacked = (tmp_path_factory.mktemp(name) for name in ("each", "stacked"))
    theirs.save_pretrained(each)
    theirs.save_pretrained(stacked, save_original_format=False)
    return theirs, each, stacked


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(66, shape, generator=torch.Generator().manual_seed(seed))


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
    model = random_model(tiny_config(mlp_only_layers=[]))  # as llama.cpp has it
    export_gguf(model, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"exps\.weight\[0\] cannot be mapped as the file keeps"):
        load_checkpoint(tmp_path / "model.gguf", towers="context", expert_storage="mmap")


@pytest.mark.parametrize("layout", ["each", "stacked"])
@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_quantised_checkpoints(pair: Any, weights: Any, bits: int, layout: str) -> None:
    """Silent failure: gates stay in full precision, or have another matrix's scales."""
    _, each, stacked = pair
    folder = each if layout == "each" else stacked
    full = load_checkpoint(each, towers="context").state_dict()
    model = load_quantised(folder, Scheme(weights=weights), "context")
    seen = set()
    for name in stacks(model):
        matrix = matrix_at(model, name)
        assert matrix.bits == bits
        values = dequantise(matrix.matrix, torch.float32)
        groups = full[name].unflatten(-1, (-1, 32))  # its rows, too, are of 32
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**bits - 1)
        error = (values.unflatten(-1, (-1, 32)) - groups).abs()
        assert (error <= 1.1 * step + 2e-2 * groups.abs().amax()).all()
        seen.add(name.rpartition(".")[2])
    assert seen == {"gate_proj", "up_proj", "down_proj"}


def test_a_quantised_checkpoint_survives_its_files(pair: Any, tmp_path: Path) -> None:
    """Silent failure: an expert's packed numbers under another's name, in memory or mapped."""
    _, each, _ = pair
    convert(each, tmp_path / "int4", "backbone", scheme=Scheme(weights="int4"))
    made = load_quantised(each, Scheme(weights="int4"), "context").float()
    tokens = ids(1, 9)
    for storage in ("memory", "mmap"):
        model = load_checkpoint(tmp_path / "int4", towers="context", expert_storage=storage)  # type: ignore[arg-type]
        assert torch.equal(model.context_logits(tokens), made.context_logits(tokens))


def test_what_inspect_counts(pair: Any) -> None:
    """Silent failure: gates are no experts, or all experts count as active."""
    _, each, stacked = pair
    for folder in (each, stacked):
        record = describe(folder)
        assert record.layers == {"attention": 4, "mixture of experts": 3, "dense MLP": 1}
        assert record.files is not None and record.files.problem is None
        tower = record.towers["context"]
        assert tower.parameters["moe routed"] == 3 * 8 * 3 * 32 * 32
        assert tower.parameters["moe router"] == 3 * 8 * 32
        assert tower.total - tower.active == 3 * 5 * 3 * 32 * 32
