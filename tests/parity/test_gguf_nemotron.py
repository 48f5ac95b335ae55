"""GGUF files of Nemotron-H that we read, against llama.cpp on the same file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from next_logprobs import next_logprobs
from tiny_models import fresh_model, random_ids
from twotower import TwoTower
from twotower.checkpoint import export_gguf, gguf_reader, load_checkpoint
from twotower.lab.bench.baselines import LlamaCpp

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
from tiny_gguf import Kind, Tensor, quantize, rewrite

# Rows of whole blocks. All experts are chosen: a rounded input would choose others.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "num_attention_heads": 8, "n_routed_experts": 3, "num_experts_per_tok": 3,
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64,
    "routed_scaling_factor": 2.5, "eos_token_id": 2,
}  # fmt: skip
PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {"hybrid_override_pattern": "M-M*-"},
    "experts": {"hybrid_override_pattern": "MEM*E"},
    "latent experts": {"hybrid_override_pattern": "MEM*E", "moe_latent_size": 32},
}
# Of the spread of log-probabilities; llama.cpp rounds the inputs of products to 8 bits: seen 0.13.
BOUNDS = {"F32": 1e-5, "F16": 0.01, "BF16": 0.06} | dict.fromkeys(
    ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"), 0.2
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_reader, "_CACHE", tmp_path / "cache")


def quantise(kind: str) -> Any:
    """The matrices of a file, routers and small ones aside, in a type."""

    def each(tensor: Tensor) -> list[Tensor]:
        name, data, _ = tensor
        if data.ndim < 2 or "ssm_norm" in name or "conv1d" in name or "gate_inp" in name:
            return [tensor]
        if data.shape[-1] % 32:
            return [tensor]  # decay rates and skips, of one column
        return [(name, quantize(data, Kind[kind]), Kind[kind])]

    return each


def compare(file: Path, model: TwoTower, bound: float) -> None:
    """Both engines' distributions behind prompts, and each token of the text that llama.cpp
    writes: none of them is worse here than its rounding explains."""
    baseline = LlamaCpp(file, threads=1)
    try:
        for length in (1, 3, 17, 70):
            ids = random_ids(length).tolist()
            theirs = next_logprobs(baseline, ids, model.config.vocab_size)
            ours = model.context_logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
            assert (theirs - ours).abs().max() < bound * ours.std(), length
        ids = random_ids(9).tolist()
        text = baseline.decode(ids, 24).tokens
        ours = model.context_logits(torch.tensor([ids + text]))[0, 8:-1].log_softmax(-1)
        behind = ours.amax(-1) - ours.gather(-1, torch.tensor(text).unsqueeze(-1))[:, 0]
        assert (behind < 2 * bound * ours.std(-1)).all()
    finally:
        baseline.close()


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_llama_cpp_writes_what_we_read(tmp_path: Path, pattern: str, kind: str) -> None:
    """Silent failure: a file is read as another model than it is there."""
    export_gguf(fresh_model(**SIZES | PATTERNS[pattern]), tmp_path / "m.gguf")
    rewrite(tmp_path / "m.gguf", tmp_path / "n.gguf", each=quantise(kind))
    model = load_checkpoint(tmp_path / "n.gguf", towers="context")
    compare(tmp_path / "n.gguf", model, BOUNDS[kind])
