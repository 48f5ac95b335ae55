"""The native library as other compilers and processors would have it: each number is the same."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_models import fresh_model, random_model
from twotower import TwoTower, accelerate
from twotower.families import config_from_dict
from twotower.layers.attention import KV
from twotower.native import library, packing, tower

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

LLAMA: dict[str, object] = {
    "model_type": "qwen3", "vocab_size": 67, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "block_size": 16, "eos_token_id": 66, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
EXPERTS: dict[str, object] = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MODELS: dict[str, Callable[[], TwoTower]] = {
    "qwen3": lambda: random_model(config_from_dict(LLAMA)),
    "nemotron_h": lambda: fresh_model(hybrid_override_pattern="M*-M-"),
    "experts": lambda: fresh_model(hybrid_override_pattern="E*E", moe_latent_size=32),
    "gated experts": lambda: random_model(config_from_dict(LLAMA | EXPERTS)),
}
# Other vectors, other instructions, and a processor for which GCC takes fused ones apart; each with
# what the machine must have to run it.
OTHERS = {
    "plain": (("-DTWOTOWER_PLAIN", "-O2"), ""),
    "zen": (("-mtune=znver3", "-mprefer-vector-width=128"), ""),
    "avx2": (("-march=haswell",), "avx2"),
    "avx512 without vnni": (("-march=skylake-avx512",), "avx512f"),
    "avx-vnni": (("-march=alderlake",), "avx_vnni"),
}


@pytest.fixture(scope="module", params=OTHERS)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that is compiled in another way."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None
    flags, needed = OTHERS[request.param]
    cpu = Path("/proc/cpuinfo")
    if needed and (not cpu.is_file() or needed not in cpu.read_text().split()):
        pytest.skip(f"this processor has no {needed}")
    file: Path = tmp_path_factory.mktemp("library") / f"{request.param}.so"
    try:
        library.compile_library(compiler, file, flags)
    except OSError as error:
        if request.param == "plain":
            raise
        pytest.skip(f"not this compiler's flags: {error}")
    return file


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_compiler_chooses_no_bit(
    monkeypatch: pytest.MonkeyPatch, other: Path, name: str, weights: str
) -> None:
    """Guards lossless speculation on other processors, and the code that its author's does not run:
    a product and a sum that are fused in tiles of some widths alone gave other texts than AR's.
    Half precision is widened by other instructions, and must be what it is in float32 here.
    """
    if weights == "int4" and name == "nemotron_h":
        pytest.skip("its rows are no whole number of groups")
    is_packed = weights.startswith("int")
    model = MODELS[name]() if is_packed else MODELS[name]().to(getattr(torch, weights))
    quantization = weights if is_packed else "none"
    expected = numbers(copy.deepcopy(model).float(), quantization)
    for module in (tower, packing):
        monkeypatch.setattr(module, "library", lambda: library.load_library(other))
    for ours, theirs in zip(expected, numbers(model, quantization), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_keys_are_rounded_alike(
    monkeypatch: pytest.MonkeyPatch, other: Path, kv_dtype: str
) -> None:
    """Guards caches on processors without instructions for halves, whose own code rounds: the
    smallest numbers and those out of range, too.
    """
    model = MODELS["qwen3"]()
    values = model.context_tower.layers[0].mixer.v_proj.weight.data
    values[:8] *= 1e-5
    values[9] *= 1e6
    expected = numbers(model, "none", kv_dtype)
    monkeypatch.setattr(tower, "library", lambda: library.load_library(other))
    for ours, theirs in zip(expected, numbers(model, "none", kv_dtype), strict=True):
        assert torch.equal(ours, theirs)


def numbers(model: TwoTower, quantization: str, kv_dtype: str = "auto") -> list[Tensor]:
    """Of prompts in tiles of every width, and of a block after them."""
    ours = accelerate(model, "native", quantization, kv_dtype)  # type: ignore[arg-type]
    found: list[Tensor] = []
    for length in (1, 3, 7, 12, 20, 81):
        ids = torch.randint(40, (1, length), generator=torch.Generator().manual_seed(length))
        cache = ours.prefill(ids)
        found += [ours.extend(cache, ids[:, :1]), ours.next_logits(cache)]
        found.append(ours.denoise(ids[:, :16], cache.view(), torch.tensor([0.5])))
        kept = (state for state in cache.layers if isinstance(state, KV))
        found += [part.float() for state in kept for part in state]
    return found
