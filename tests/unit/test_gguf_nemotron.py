"""GGUF files of Nemotron-H: what other writers put in or leave out, and one line for files that
lie."""

import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from published import PUBLISHED
from tiny_models import fresh_model, random_ids, tiny_config
from twotower import TwoTower, load_model, load_tokenizer
from twotower.backends import accelerate
from twotower.checkpoint import (
    export_gguf,
    files,
    gguf_reader,
    inspect,
    load_checkpoint,
    load_quantised,
)
from twotower.families import nemotron_h, read_config
from twotower.model.precision import Scheme
from twotower.native import library

pytest.importorskip("gguf")
from tiny_gguf import Kind, Tensor, blocks, dequantize, rewrite

EXPERTS: dict[str, object] = {"hybrid_override_pattern": "M*EME", "routed_scaling_factor": 2.5}
# Sizes of a tiny model, and what a config.json says of the layers of each kind.
TINY: dict[str, object] = {
    "hidden_size": 16, "vocab_size": 41, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "attention_head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
    "ssm_state_size": 8, "n_groups": 2, "intermediate_size": 24, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 20, "eos_token_id": [2, 11],
    "architectures": ["NemotronHForCausalLM"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf_reader, "_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def read(file: Path) -> TwoTower:
    return load_checkpoint(file, towers="context")


def same_logits(one: TwoTower, other: TwoTower) -> bool:
    tokens = random_ids(2, 30)
    return torch.equal(one.context_logits(tokens), other.context_logits(tokens))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "Nemotron" in name])
def test_a_published_layout_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    """Silent failure: a layer of another kind, a decay rate rounded twice, groups or experts in
    another order; or an ordinary token that is taken for the mask."""
    latent = {"moe_latent_size": 8} if "moe_latent_size" in PUBLISHED[name] else {}
    shared = {"hybrid_override_pattern": None} | PUBLISHED[name]
    model = fresh_model(**(shared | TINY | latent))
    export_gguf(model, tmp_path / "m.gguf")
    again = read(tmp_path / "m.gguf")
    assert again.config.context == model.config.context
    assert again.config.has_own_mask and again.config.eos_token_ids == (2, 11)
    assert same_logits(again, model)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "hybrid_override_pattern": "M*-"},
        {"mamba_num_heads": 6, "n_groups": 3, "conv_kernel": 3, "hybrid_override_pattern": "*M-"},
        {"tie_word_embeddings": True, "layer_norm_epsilon": 3e-4, "hybrid_override_pattern": "M*"},
        {"norm_topk_prob": False, "hybrid_override_pattern": "EM*"},
        {"residual_in_fp32": False, "mask_token_id": 7, "eos_token_id": None, **EXPERTS},
    ],
)
def test_what_a_file_says_of_the_layers_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Silent failure: biases, groups, widths and scales that no release has are the defaults."""
    model = fresh_model(**changes)
    export_gguf(model, tmp_path / "m.gguf")
    again = read(tmp_path / "m.gguf")
    assert again.config.context == model.config.context and same_logits(again, model)
    assert again.config.mask_token_id == model.config.mask_token_id
    assert again.config.eos_token_ids == model.config.eos_token_ids


PROBE = """
import sys, twotower.checkpoint as checkpoint
from twotower.checkpoint import gguf_reader
from pathlib import Path

gguf_reader._CACHE = Path(sys.argv[2])
checkpoint.load_checkpoint(sys.argv[1], towers="context")
print("torch._dynamo" in sys.modules)
"""


def test_a_file_is_read_without_the_compiler(tmp_path: Path) -> None:
    """Guards the start: an operation on a tensor without memory may load all of torch.compile,
    seconds of it."""
    export_gguf(fresh_model(**EXPERTS), tmp_path / "m.gguf")
    command = [sys.executable, "-c", PROBE, str(tmp_path / "m.gguf"), str(tmp_path / "other")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_decay_rates_are_the_same_to_the_bit() -> None:
    """Guards texts of long prompts: a rate that is off by its last bit acts on every token."""
    config = tiny_config()
    given = 3 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    name = "layers.0.mixer.A_log"
    found = nemotron_h.values_from_gguf(name, nemotron_h.gguf_values(name, given, config), config)
    assert torch.equal(found.exp(), given.exp())


MOE = "nemotron_h_moe"


@pytest.mark.parametrize(
    "changes",
    [
        {f"{MOE}.attention.layer_norm_rms_epsilon": None, f"{MOE}.vocab_size": None},
        {f"{MOE}.attention.layer_norm_epsilon": 0.5, f"{MOE}.expert_shared_count": None},
        {f"{MOE}.attention.head_count": [4] * 5, f"{MOE}.expert_used_count": [0, 0, 2, 0, 2]},
        {f"{MOE}.attention.head_count": [0, 4, 0, 0, 0]},
        {f"{MOE}.expert_feed_forward_length": [0, 0, 12, 0, 12]},
        {f"{MOE}.rope.freq_base": 10_000.0, f"{MOE}.expert_gating_func": 2},
        {f"{MOE}.expert_group_count": 1, f"{MOE}.expert_group_used_count": 1},
        {"tokenizer.ggml.mask_token_id": 3, "general.file_type": None},
    ],
)
def test_other_ways_to_say_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Guards files of other writers: one value or one for each layer, and what llama.cpp takes
    where a file is silent."""
    model = fresh_model(**EXPERTS)
    export_gguf(model, tmp_path / "m.gguf")
    rewrite(tmp_path / "m.gguf", tmp_path / "n.gguf", changes)
    assert same_logits(read(tmp_path / "n.gguf"), model)


def test_a_silent_file_means_what_llama_cpp_takes(tmp_path: Path) -> None:
    """Silent failure: weights of experts that are not divided by their sum there are here."""
    model = fresh_model(**(EXPERTS | {"norm_topk_prob": False, "routed_scaling_factor": 1.0}))
    export_gguf(model, tmp_path / "m.gguf")
    silent = dict.fromkeys((f"{MOE}.expert_weights_norm", f"{MOE}.expert_weights_scale"))
    for number, changes in enumerate((silent, {f"{MOE}.expert_weights_scale": 0.0})):
        rewrite(tmp_path / "m.gguf", tmp_path / f"{number}.gguf", changes)
        assert same_logits(read(tmp_path / f"{number}.gguf"), model)
    heads = fresh_model(hybrid_override_pattern="M*-", head_dim=4)
    export_gguf(heads, tmp_path / "h.gguf")
    lengths = dict.fromkeys(f"nemotron_h.attention.{one}_length" for one in ("key", "value"))
    rewrite(tmp_path / "h.gguf", tmp_path / "i.gguf", lengths)
    assert same_logits(read(tmp_path / "i.gguf"), heads)


def without(*names: str) -> Any:
    return lambda tensor: [] if tensor[0] in names else [tensor]


def test_tensors_that_a_file_leaves_out(tmp_path: Path) -> None:
    """Guards a head that shares the embeddings' weights, and convolutions without a bias."""
    model = fresh_model(
        hybrid_override_pattern="M*-", tie_word_embeddings=True, use_conv_bias=False
    )
    export_gguf(model, tmp_path / "m.gguf")
    left_out = without("output.weight", "blk.0.ssm_conv1d.bias")
    rewrite(tmp_path / "m.gguf", tmp_path / "n.gguf", each=left_out)
    again = read(tmp_path / "n.gguf")
    assert again.config.context == model.config.context and again.config.tie_word_embeddings
    assert same_logits(again, model)


def with_drafts(tensor: Tensor) -> list[Tensor]:
    """The tensor, and beside that of the last block one of a block of multi-token prediction."""
    name, data, kind = tensor
    if not name.startswith("blk.4."):
        return [tensor]
    return [tensor, (name.replace("blk.4.", "blk.5."), data, kind)]


def test_blocks_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    """Guards files of Nemotron 3 with such a block behind the others: it is no layer, and not
    missing in the model."""
    model = fresh_model(**EXPERTS)
    export_gguf(model, tmp_path / "m.gguf")
    lists = {
        f"{MOE}.block_count": 6, f"{MOE}.nextn_predict_layers": 1,
        f"{MOE}.feed_forward_length": [0, 0, 12, 0, 12, 12],
        f"{MOE}.attention.head_count_kv": [0, 2, 0, 0, 0, 2],
    }  # fmt: skip
    rewrite(tmp_path / "m.gguf", tmp_path / "n.gguf", lists, with_drafts)
    again = read(tmp_path / "n.gguf")
    assert again.config.context.pattern == "M*EME" and same_logits(again, model)
    rewrite(tmp_path / "m.gguf", tmp_path / "o.gguf", each=with_drafts)  # which nobody announced
    with pytest.raises(ValueError, match=r"13 unexpected: blk\.5\.attn_norm\.weight"):
        read(tmp_path / "o.gguf")


@pytest.mark.parametrize("kind", gguf_reader.TYPES)
def test_experts_of_every_type_become_the_numbers_they_mean(tmp_path: Path, kind: str) -> None:
    """Silent failure: the experts of a stack change places, or begin in the middle of a block."""
    model = fresh_model(**(EXPERTS | {"hidden_size": 256, "n_routed_experts": 3}))
    export_gguf(model, tmp_path / "m.gguf")
    values: dict[str, np.ndarray] = {}

    def quantise(tensor: Tensor) -> list[Tensor]:
        name, data, _ = tensor
        if not name.endswith(("ffn_up_exps.weight", "ssm_in.weight")):
            return [tensor]
        made = blocks((data.size // 256, 256), Kind[kind], seed=len(values))
        values[name] = dequantize(made, Kind[kind]).reshape(data.shape)
        return [(name, made.reshape(*data.shape[:-1], -1), Kind[kind])]

    rewrite(tmp_path / "m.gguf", tmp_path / "n.gguf", each=quantise)
    found = read(tmp_path / "n.gguf").state_dict()
    tower = "context_tower.layers"
    for ours, theirs in (
        (f"{tower}.2.mixer.experts.up_proj", "blk.2.ffn_up_exps.weight"),
        (f"{tower}.4.mixer.experts.up_proj", "blk.4.ffn_up_exps.weight"),
        (f"{tower}.3.mixer.in_proj.weight", "blk.3.ssm_in.weight"),
    ):
        np.testing.assert_array_equal(found[ours].numpy(), values[theirs])
    files = inspect.describe(tmp_path / "n.gguf").files
    assert files is not None and files.elements_by_dtype[kind] > 2 * 3 * 12 * 256


def test_experts_are_quantised_one_by_one(tmp_path: Path) -> None:
    """Guards the memory of a conversion, and experts in the files, which GGUF has no place for."""
    export_gguf(fresh_model(**EXPERTS), tmp_path / "m.gguf")
    known = load_quantised(tmp_path / "m.gguf", Scheme(weights="int8"), "context").state_dict()
    model = fresh_model(**EXPERTS)
    up = known["context_tower.layers.2.mixer.experts.up_proj.qdata"]
    scale = known["context_tower.layers.2.mixer.experts.up_proj.scale"]
    given = model.context_tower.layers[2].mixer.experts.up_proj  # type: ignore[union-attr]
    assert (up * scale - given).abs().max() < given.abs().max() / 100  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"exps\.weight\[0\] cannot be mapped as the file"):
        load_checkpoint(tmp_path / "m.gguf", expert_storage="mmap")


def test_a_file_without_a_tokenizer_is_a_model(tmp_path: Path) -> None:
    """Guards those who have a tokenizer of their own: the weights of such a file are read, and
    its tokens, which are numbers, are no tokenizer."""
    model = fresh_model(**EXPERTS)
    export_gguf(model, tmp_path / "m.gguf")
    assert same_logits(load_model(tmp_path / "m.gguf", backend="eager"), model)
    with pytest.raises(ValueError, match=r"^tokenizer: no file .*tokenizer\.json; give a folder"):
        load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("pattern", ["M*EME", "M*-"])
def test_matrices_are_packed_out_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, quantization: Any
) -> None:
    """Guards the memory of a load in few bits, and its numbers: a stack of experts in full
    precision is many times what a laptop has."""
    try:
        library.library()
    except OSError as error:
        pytest.skip(f"no native library: {error}")

    model = fresh_model(hybrid_override_pattern=pattern, hidden_size=64, moe_intermediate_size=64)
    export_gguf(model, tmp_path / "m.gguf", dtype="q8_0")
    whole = accelerate(load_checkpoint(tmp_path / "m.gguf"), "native", quantization)
    read_before, sizes = gguf_reader.read_tensor, list[int]()

    def spy(file: Path, entry: Mapping[str, Any]) -> torch.Tensor:
        found = read_before(file, entry)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(files, "read_tensor", spy)
    packed = load_model(tmp_path / "m.gguf", quantization=quantization)
    assert packed.unread and all(
        p.is_meta for n, p in packed.named_parameters() if n in packed.unread
    )
    assert max(sizes) < 4 * 64 * 64  # a stack of experts
    tokens = random_ids(2, 9)
    found, known = (one.next_logits(one.prefill(tokens)) for one in (packed, whole))
    assert torch.equal(found, known)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"block_count": 10**9}, "block_count=1000000000 with nextn_predict_layers=0 is not supp"),
        ({"nextn_predict_layers": 5}, "block_count=5 with nextn_predict_layers=5 is not supported"),
        ({"block_count": 4}, "feed_forward_length has 5 values for 4 blocks"),
        ({"block_count": None}, "lacks the metadata 'block_count'"),
        ({"ssm.inner_size": None}, "lacks the metadata 'ssm.inner_size'"),
        ({"ssm.group_count": 3}, "mamba_num_heads=4 must be a multiple of n_groups=3"),
        ({"ssm.time_step_rank": 0}, "mamba_num_heads=0 must be between"),
        ({"ssm.state_size": 7}, "misshapen"),
        ({"expert_used_count": None}, "lacks the metadata 'expert_used_count'"),
        (
            {"expert_used_count": [0, 0, 1, 0, 2]},
            "expert_used_count gives layers of a kind differe",
        ),
        ({"expert_used_count": 9}, "num_experts_per_tok=9 must be"),
        ({"expert_count": 3}, "4 unexpected: blk.2.ffn_up_exps.weight[3]"),
        ({"expert_count": 5}, "experts.4.up_proj.weight"),
        ({"expert_count": 0}, "unexpected"),
        ({"expert_group_count": 2}, "expert_group_count=2 is not supported; only 1"),
        ({"expert_shared_feed_forward_length": None}, "'expert_shared_feed_forward_length'"),
        ({"attention.causal": False}, "attention.causal=False is not supported; only True"),
        ({"attention.head_count_kv": [0, 3, 0, 0, 0]}, "must be a multiple of num_key_value_heads"),
        (
            {"attention.head_count_kv": [0, 0, 0, 0, 0]},
            "make layers MMEME; without M or * they are not supp",
        ),
        ({"feed_forward_length": "wide"}, "make layers EEEEE; without M or *"),
        ({"block_count": "five"}, "truncated or not a GGUF file"),
        ({"moe_latent_size": 8}, "fc1_latent_proj"),
        ({"embedding_length": 0}, "hidden_size=0 must be between"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, cache: Path, changes: dict[str, Any], expected: str
) -> None:
    """Silent failure: half a model is loaded, or a traceback shown."""
    export_gguf(fresh_model(**EXPERTS), tmp_path / "m.gguf")
    own = {f"{MOE}.{name}": value for name, value in changes.items()}
    rewrite(tmp_path / "m.gguf", tmp_path / "n.gguf", own)
    with pytest.raises(ValueError) as error:
        read(tmp_path / "n.gguf")
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert "n.gguf" in str(error.value) or "config.json" in str(error.value)


def test_names_of_another_alphabet_are_one_line(tmp_path: Path) -> None:
    """Guards the terminal: the name of a tensor is printed where it fits no model."""
    export_gguf(fresh_model(**EXPERTS), tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"blk.3.ssm_d", b"b\nk.3.ssm_d"))
    with pytest.raises(ValueError, match=r"m\.gguf: has a tensor of the name 'b\\nk\.3\.ssm_d"):
        read(tmp_path / "m.gguf")


def test_any_metadata_is_a_model_or_one_line(tmp_path: Path) -> None:
    """Guards tracebacks, and sizes that would take the machine's memory: a hundred random changes
    of the values of a file."""
    export_gguf(fresh_model(**EXPERTS), tmp_path / "m.gguf")
    names = [n for n in gguf_reader._open(tmp_path / "m.gguf").fields if not n.startswith("GGUF.")]
    draw = random.Random(5)
    values = (None, 0, 1, 3, 7, 2**31, 2**32 - 1, -0.5, 1e30, float("nan"), True, "x", "", [0], [2])
    for number in range(100):
        changes = {draw.choice(names): draw.choice(values) for _ in range(draw.choice((1, 1, 2)))}
        file = tmp_path / f"{number}.gguf"
        rewrite(tmp_path / "m.gguf", file, changes | {"general.architecture": MOE})
        try:
            read_config(gguf_reader.open_gguf(file))
            read(file)
        except ValueError as error:
            assert "\n" not in str(error), changes
        file.unlink()
