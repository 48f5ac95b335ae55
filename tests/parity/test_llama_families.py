"""Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3 against `transformers` in float32: tiny random
models.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from next_logprobs import next_logprobs
from twotower import GenerateOptions, TwoTower, generate
from twotower.checkpoint import (
    convert,
    export_gguf,
    export_transformers,
    gguf_reader,
    load_checkpoint,
)
from twotower.lab.bench.baselines import LlamaCpp
from twotower.specs import MLPSpec

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # float32 sums in another order, on any processor
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 66,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS = ("sliding", "full", "sliding", "sliding", "full")
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "experts_implementation": "eager",
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, biases": (
        "Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "llama, one KV head, its own head size": (
        "Llama", {"num_key_value_heads": 1, "head_dim": 12}
    ),
    "llama, linear": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0}}
    ),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 16}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    "qwen3, yarn of its own": (
        "Qwen3", {
            "head_dim": 16, "rope_parameters": YARN | {
                "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.7,
                "mscale_all_dim": 0.4,
            },
        }
    ),
    "smollm3, yarn": ("SmolLM3", {"rope_parameters": YARN | {"attention_factor": 1.7}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2, its own head size": ("Qwen2", {"head_dim": 12, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "mistral, window": ("Mistral", {"sliding_window": 17}),
    "qwen2, window": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
    ),
    "qwen3, its own windows": (
        "Qwen3", {
            "use_sliding_window": True, "sliding_window": 5, "head_dim": 8,
            "layer_types": [f"{kind}_attention" for kind in KINDS],
        }
    ),
    "qwen3 moe": ("Qwen3Moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3 moe, tied, 32 wide": (
        "Qwen3Moe", EXPERTS | {
            "norm_topk_prob": True, "moe_intermediate_size": 32, "tie_word_embeddings": True,
        }
    ),
    "qwen3 moe, not normed, biases": ("Qwen3Moe", EXPERTS | {"attention_bias": True}),
    "qwen3 moe, some dense": (
        "Qwen3Moe", EXPERTS | {
            "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True,
        }
    ),
    "smollm3, window": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 40}),
    "smollm3": ("SmolLM3", {}),
    "smollm3, llama 3": ("SmolLM3", {"rope_parameters": LLAMA3}),
    "smollm3, its own layers without positions": (
        "SmolLM3", {"no_rope_layers": [0, 1, 1, 0, 1], "tie_word_embeddings": False}
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Their model with no symmetric weight, ours from the files that it saves, and the folder."""
    name, changes = CASES[request.param]
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    torch.manual_seed(7)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        scale = 0.3 if parameter.dim() > 1 else 0.1
        parameter.add_(scale * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_checkpoint(folder, towers="context"), folder


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(66, shape, generator=torch.Generator().manual_seed(seed))


def test_logits(pair: Any) -> None:
    """Silent failure: positions, biases or head norms differ, and texts are plausible nonsense."""
    theirs, ours, _ = pair
    tokens = ids(2, 150)  # beyond the length where Llama 3's scaling begins
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    assert (ours.context_logits(tokens) - expected).abs().max() < TOLERANCE * expected.std()


def test_a_base_model_is_read_where_its_head_is_tied(pair: Any, tmp_path: Path) -> None:
    """Silent failure: files of `AutoModel`, without a prefix, count as another model's."""
    theirs, ours, _ = pair
    theirs.model.save_pretrained(tmp_path)
    if not theirs.config.tie_word_embeddings:
        with pytest.raises(ValueError, match=r"has no lm_head\.weight"):
            load_checkpoint(tmp_path, towers="context")
        return
    again = load_checkpoint(tmp_path, towers="context")
    assert torch.equal(again.context_logits(ids(1, 9)), ours.context_logits(ids(1, 9)))


@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_greedy_texts(pair: Any, length: int) -> None:
    theirs, ours, _ = pair
    prompt = ids(1, length, seed=length)
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    options = GenerateOptions(mode="ar", max_new_tokens=12, ignore_eos=True)
    (found,) = generate(ours, [prompt[0].tolist()], options)
    assert found.tokens == expected[0, length:].tolist()


def test_ragged_rows_and_any_chunks(pair: Any) -> None:
    """Silent failure: a row's positions are those of its longest neighbour, or start anew."""
    theirs, ours, _ = pair
    lengths = torch.tensor([9, 1, 23, 16])
    tokens = ids(4, 23, seed=3)
    for chunk in (1, 4, 7, 23):
        cache = ours.prefill(tokens, lengths, chunk_size=chunk)
        following = ids(4, 5, seed=4)
        counts = torch.tensor([5, 2, 1, 4])
        ours.extend(cache, following, counts)
        found = ours.next_logits(cache)
        for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
            whole = torch.cat([tokens[row, :length], following[row, :count]]).unsqueeze(0)
            expected = theirs(whole).logits[0, -1]
            assert (found[row] - expected).abs().max() < TOLERANCE * expected.std()


def test_the_way_back(pair: Any, tmp_path: Path) -> None:
    """Silent failure: the export loads with a tensor that `transformers` filled at random."""
    theirs, ours, _ = pair
    export_transformers(ours, tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values()), report
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) != again.config.tie_word_embeddings  # noqa: SIM118
    assert type(again) is type(theirs)
    tokens = ids(1, 90, seed=5)
    expected = theirs(tokens).logits
    assert (again.eval()(tokens).logits - expected).abs().max() < TOLERANCE * expected.std()


def test_a_denoiser_starts_as_its_backbone(pair: Any) -> None:
    """Silent failure: a block's positions begin at 0, so that the denoiser reads shifted keys.

    Without conditioning and without masks, a copy of the backbone sees a block of one token as the
    backbone does.
    """
    _, context, folder = pair
    both: TwoTower = load_checkpoint(folder)
    assert both.config.mask_token_id == both.config.vocab_size
    tokens = ids(3, 14, seed=6)
    lengths = torch.tensor([13, 5, 9])
    cache = both.prefill(tokens, lengths)
    block = ids(3, 1, seed=8)
    found = both.denoise(block, cache.view(), t=torch.ones(3))[:, 0]
    context.extend(cache, block)
    torch.testing.assert_close(found, context.next_logits(cache), rtol=1e-3, atol=1e-3)


def test_blocks_in_training_are_blocks_in_decoding(pair: Any) -> None:
    """Silent failure: training turns keys and queries by other positions than decoding."""
    _, _, folder = pair
    model = load_checkpoint(folder)
    clean = ids(2, 24, seed=9)
    noisy = clean.masked_fill(
        torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) < 0.6, 67
    )
    index = torch.tensor([[2, 0], [1, 2]])
    picked = noisy.unflatten(1, (3, 8))[torch.arange(2).unsqueeze(1), index].flatten(1)
    with torch.no_grad():
        found = model.training_logits(clean, picked, None, 8, index).unflatten(1, (2, 8))
    for row in range(2):
        for place in range(2):
            block = int(index[row, place])
            if block == 0:
                continue
            cache = model.prefill(clean[row : row + 1, : 8 * block])
            own = noisy[row : row + 1, 8 * block : 8 * block + 8]
            expected = model.denoise(own, cache.view(), None)[0]
            torch.testing.assert_close(found[row, place], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def gguf_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_reader, "_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def written(model: TwoTower, file: Path, dtype: Any = "float32") -> bool:
    """Whether llama.cpp can represent the model, which then is in the file."""
    attention = model.config.context.layers[0]
    rotary = [spec.rope is not None for spec in model.config.context.layers[::2]]  # type: ignore[union-attr]
    reason = None
    if any(spec.window for spec in model.config.context.layers[::2]):  # type: ignore[union-attr]
        reason = "sliding_window cannot be exported"
    elif rotary not in ([True] * 5, [True, True, True, False, True]):
        reason = "no_rope_layers cannot be exported"
    elif model.config.family in ("qwen3", "qwen3_moe") and attention.bias:  # type: ignore[union-attr]
        reason = "attention_bias=true cannot be exported"
    elif model.config.family == "qwen3_moe" and model.config.context.layers_of(MLPSpec):
        reason = "mlp_only_layers, decoder_sparse_step cannot be exported"
    elif model.config.family == "qwen2" and attention.head_dim == 12:  # type: ignore[union-attr]
        reason = "head_dim=12 cannot be exported: llama.cpp knows only"
    elif model.config.family == "smollm3" and attention.rope.scaling == "llama3":  # type: ignore[union-attr]
        reason = "rope_type='llama3' cannot be exported"
    rope = model.config.context.rotary[0]  # type: ignore[index]
    if reason is None and rope.scaling == "yarn" and model.config.family in ("qwen3", "smollm3"):
        reason = "rope_type='yarn' cannot be exported with beta_fast"
    if reason is None:
        export_gguf(model, file, dtype=dtype)
    else:
        with pytest.raises(ValueError, match=reason):
            export_gguf(model, file, dtype=dtype)
    return reason is None


def test_llama_cpp_computes_our_distribution(pair: Any, tmp_path: Path) -> None:
    """Silent failure: heads in llama.cpp's order, or positions that it scales otherwise."""
    pytest.importorskip("xllamacpp")
    _, ours, _ = pair
    if not written(ours, tmp_path / "model.gguf"):
        return
    baseline = LlamaCpp(tmp_path / "model.gguf", threads=1)
    try:
        for length in (1, 3, 90):
            prompt = ids(1, length, seed=length)
            theirs = next_logprobs(baseline, prompt[0].tolist(), ours.config.vocab_size)
            expected = ours.context_logits(prompt)[0, -1].log_softmax(-1)
            assert (theirs - expected).abs().max() < TOLERANCE * expected.std()
    finally:
        baseline.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_a_gguf_file_is_read_as_the_model_that_wrote_it(
    pair: Any, tmp_path: Path, gguf_cache: None, dtype: Any
) -> None:
    """Silent failure: queries and keys stay in llama.cpp's order, a scaling is lost, or a converted
    folder goes on reading the GGUF file.
    """
    _, ours, _ = pair
    file = tmp_path / "model.gguf"
    if not written(ours, file, dtype):
        return
    if ours.config.context.rotary[0].scaling == "llama3":  # not one of the releases' scalings
        with pytest.raises(ValueError, match="factors of no known scaling"):
            load_checkpoint(file, towers="context")
        return
    again = load_checkpoint(file, towers="context")
    assert again.config.context.layers == ours.config.context.layers
    assert again.config.context.norm_eps == ours.config.context.norm_eps
    assert again.config.tie_word_embeddings == ours.config.tie_word_embeddings
    if dtype == "float32":
        tokens = ids(1, 60, seed=2)
        assert torch.equal(again.context_logits(tokens), ours.context_logits(tokens))
        convert(file, tmp_path / "converted", "backbone")
        assert not [f.name for f in (tmp_path / "converted").iterdir() if "gguf" in f.name]
    steps = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "q8_0": 0.51 / 127}
    for name, value in ours.state_dict().items():
        error = (again.state_dict()[name].float() - value).abs().max() / value.abs().max()
        # Rows that are no multiple of 32 numbers are float16 in a q8_0 file.
        assert error <= steps[dtype] + 2.0**-10 * (dtype == "q8_0"), name
