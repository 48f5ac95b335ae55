"""The exported GGUF file, run by llama.cpp: its distribution and its greedy text are ours.

llama.cpp is independent code, so a wrong sign, order, name or size of anything exported shows in
every probability of the vocabulary. float32 files run with a float32 cache there: 1e-4 is sums in
another order (seen: 2e-5).
"""

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from next_logprobs import next_logprobs
from tiny_models import fresh_model, random_ids, random_model
from tiny_tokenizers import added, byte_level, llama
from twotower import TwoTower
from twotower.checkpoint import convert_to_gguf, export_gguf, gguf_reader, load_checkpoint, resolve
from twotower.checkpoint.files import shipped_folder
from twotower.checkpoint.gguf import Precision
from twotower.checkpoint.gguf_tokenizer import SPLITS
from twotower.engine import GenerateOptions, generate
from twotower.families import config_from_dict
from twotower.lab.bench.baselines import Baseline, LlamaCpp
from twotower.tokenizer import load_tokenizer

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

TOLERANCE = 1e-4
TEXTS = [
    "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:",
    "Translate to German: The cat",
    "def add(a, b):\n",
    "Edit: the red car",
]


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return load_checkpoint(shipped_folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Baseline]:
    """llama.cpp on the shipped model in float32."""
    file = tmp_path_factory.mktemp("gguf") / "shipped.gguf"
    convert_to_gguf(shipped_folder(), file, "float32")
    baseline = LlamaCpp(file, threads=1)
    yield baseline
    baseline.close()


def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(shipped_folder())
    return [tokenizer.encode(text, add_bos=True) for text in TEXTS]


@torch.no_grad()
def our_logprobs(model: TwoTower, ids: list[int]) -> Tensor:
    return model.context_logits(torch.tensor([ids]))[0, -1].log_softmax(-1)


def difference(model: TwoTower, baseline: Baseline, ids: list[int]) -> float:
    """Largest absolute difference of the next token's log-probabilities, over the vocabulary."""
    theirs = next_logprobs(baseline, ids, model.config.vocab_size)
    assert theirs.shape == (model.config.vocab_size,)
    return (theirs - our_logprobs(model, ids)).abs().max().item()  # NaN, if any is missing


def run_tiny(folder: Path, **changes: object) -> float:
    """Worst difference of a tiny random model over prompts of 1 to 70 tokens."""
    model = fresh_model(**changes)
    export_gguf(model, folder / "tiny.gguf")
    baseline = LlamaCpp(folder / "tiny.gguf", threads=1)
    worst = max(difference(model, baseline, random_ids(n).tolist()) for n in (1, 3, 17, 70))
    baseline.close()
    return worst


def test_llama_cpp_computes_our_distribution(model: TwoTower, llama_cpp: Baseline) -> None:
    """Guards the baseline's weights: a comparison with a model that computes otherwise is void."""
    assert (llama_cpp.name, llama_cpp.dtype) == ("llama.cpp-f32", "float32")
    for ids in prompts():
        assert difference(model, llama_cpp, ids) < TOLERANCE


def test_llama_cpp_writes_our_greedy_tokens(model: TwoTower, llama_cpp: Baseline) -> None:
    """Guards its cache and its states between tokens, which one prompt's logits do not show."""
    ours = generate(model, prompts(), GenerateOptions(mode="ar", max_new_tokens=64))
    theirs = [llama_cpp.decode(ids, 64).tokens for ids in prompts()]
    assert theirs == [completion.tokens for completion in ours]
    assert all(tokens[-1] in model.config.eos_token_ids for tokens in theirs)  # all end


def split_by_llama_cpp(llama_cpp: Baseline, text: str, adds_bos: bool) -> list[int]:
    connection = HTTPConnection(llama_cpp._address)  # type: ignore[attr-defined]  # no public door
    connection.request("POST", "/tokenize", json.dumps({"content": text, "add_special": adds_bos}))
    found: list[int] = json.load(connection.getresponse())["tokens"]
    return found


SPLIT = "\n\n".join(TEXTS) + "  a  5 77\n\n\n  it's 3.14 \t caf\u00e9 \u6771\u4eac 12\u0663 x"


def test_llama_cpp_splits_text_as_we_do(llama_cpp: Baseline) -> None:
    """Guards the vocabulary: digits one by one, contractions, runs of spaces, other scripts."""
    found = split_by_llama_cpp(llama_cpp, SPLIT, adds_bos=False)
    assert found == load_tokenizer(shipped_folder()).encode(SPLIT)


LLAMA: dict[str, object] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 310, "bos_token_id": None,
}  # fmt: skip


def with_merges(kind: str) -> dict[str, Any]:
    """Byte-level BPE that joins letters, digits, spaces and line ends across most borders, with a
    word that no merges make."""
    space, line = "\u0120", "\u010a"
    pairs = ["b C", "a b", "1 2", "12 3", "' s", f"{space} {space}", f"{line} {line}", f"{space} a"]
    values = byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": SPLITS[kind]})
    vocab = values["model"]["vocab"]
    del vocab["zz"]
    vocab |= {pair.replace(" ", ""): 256 + number for number, pair in enumerate(pairs)}
    vocab["zqz"] = len(vocab)
    values["model"] |= {"merges": pairs, "ignore_merges": kind in ("llama-bpe", "tekken")}
    return {**values, "added_tokens": [added(len(vocab), "<|end|>")]}


@pytest.mark.parametrize("kind", ["llama", *SPLITS])
def test_tokenizers_of_other_makers_split_text_there_as_here(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards Llama 2's pieces, which were written as bytes, and the splits of Qwen and Llama 3,
    which had no name when they were written; and the way back."""
    monkeypatch.setattr(gguf_reader, "_CACHE", tmp_path / "cache")
    values = llama() if kind == "llama" else with_merges(kind)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    ids = {"bos_token_id": 1, "eos_token_id": 2} if kind == "llama" else {"eos_token_id": 265}
    model = random_model(config_from_dict(LLAMA | ids))
    export_gguf(model, tmp_path / "tiny.gguf", tokenizer=tokenizer)
    assert not caplog.messages
    text = SPLIT + " 123123 abab bC  a ab's\n\n\n   12\nzqz"
    baseline = LlamaCpp(tmp_path / "tiny.gguf", threads=1)
    found = split_by_llama_cpp(baseline, text, tokenizer.adds_bos)
    baseline.close()
    assert found == tokenizer.encode_prompt(text)
    again = load_tokenizer(resolve(tmp_path / "tiny.gguf"))
    assert again.encode_prompt(text) == found and again.decode(found) == text


@pytest.mark.parametrize(
    "changes",
    [
        {"hybrid_override_pattern": "M*-M*"},
        {"hybrid_override_pattern": "*M-", "attention_bias": True, "mlp_bias": True},
        {"hybrid_override_pattern": "M*-", "use_conv_bias": False, "tie_word_embeddings": True},
        {"hybrid_override_pattern": "M*M-", "mamba_num_heads": 6, "n_groups": 3, "conv_kernel": 3},
        {"hybrid_override_pattern": "M*EM*E"},
        {
            "hybrid_override_pattern": "EM*",
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
        },
    ],
)
def test_every_kind_of_layer_is_exported(tmp_path: Path, changes: dict[str, object]) -> None:
    """Guards groups, heads, biases and experts that the shipped model does not have."""
    assert run_tiny(tmp_path, **changes) < TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "worst"),
    [("float16", 0.02), ("bfloat16", 0.3), ("q8_0", 1.0), ("q4_0", 12.0)],
)
def test_smaller_precisions_stay_close(
    model: TwoTower, tmp_path: Path, dtype: Precision, worst: float
) -> None:
    """Bounds are about twice what was seen; a wrong value is off by many units somewhere."""
    convert_to_gguf(shipped_folder(), tmp_path / "small.gguf", dtype)
    baseline = LlamaCpp(tmp_path / "small.gguf", threads=1)
    assert baseline.dtype == dtype
    found = [difference(model, baseline, ids) for ids in prompts()]
    baseline.close()
    assert 1e-3 < max(found) < worst, found


def test_a_model_without_an_end_token_runs_on(tmp_path: Path) -> None:
    """Guards the length of replays: llama.cpp would take some token for the end."""
    model = fresh_model(hybrid_override_pattern="M*EM*")
    export_gguf(model, tmp_path / "tiny.gguf")
    baseline = LlamaCpp(tmp_path / "tiny.gguf", threads=1)
    assert len(baseline.decode(random_ids(70).tolist(), 30).tokens) == 30
    baseline.close()
