"""The exported GGUF file, run by llama.cpp: its distribution and its greedy text are ours.

llama.cpp is independent code, so a wrong sign, order, name or size of anything exported shows in
every probability of the vocabulary. float32 files run with a float32 cache there: 1e-4 is sums in
another order (seen: 2e-5).
"""

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_models import fresh_model, random_ids
from twotower import TwoTower
from twotower.checkpoint import convert_to_gguf, export_gguf, load_checkpoint
from twotower.checkpoint.files import shipped_folder
from twotower.checkpoint.gguf import Precision
from twotower.engine import GenerateOptions, generate
from twotower.lab.race.baselines import Baseline, load_llama_cpp
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
    baseline = load_llama_cpp(file, threads=1)
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
    theirs = torch.tensor(baseline.logprobs(ids))
    assert theirs.shape == (model.config.vocab_size,)
    return (theirs - our_logprobs(model, ids)).abs().max().item()  # NaN, if any is missing


def run_tiny(folder: Path, **changes: object) -> float:
    """Worst difference of a tiny random model over prompts of 1 to 70 tokens."""
    model = fresh_model(**changes)
    export_gguf(model, folder / "tiny.gguf")
    baseline = load_llama_cpp(folder / "tiny.gguf", threads=1)
    worst = max(difference(model, baseline, random_ids(n).tolist()) for n in (1, 3, 17, 70))
    baseline.close()
    return worst


def test_llama_cpp_computes_our_distribution(model: TwoTower, llama_cpp: Baseline) -> None:
    """Guards the baseline's weights: a race against a model that computes otherwise is void."""
    assert (llama_cpp.name, llama_cpp.dtype) == ("llama.cpp-f32", "float32")
    for ids in prompts():
        assert difference(model, llama_cpp, ids) < TOLERANCE


def test_llama_cpp_writes_our_greedy_tokens(model: TwoTower, llama_cpp: Baseline) -> None:
    """Guards its cache and its states between tokens, which one prompt's logits do not show."""
    ours = generate(model, prompts(), GenerateOptions(mode="ar", max_new_tokens=40))
    theirs = [llama_cpp.decode(ids, 40).tokens for ids in prompts()]
    assert theirs == [completion.tokens for completion in ours]
    assert all(tokens[-1] == model.config.eos_token_id for tokens in theirs)  # each reaches its end


def test_llama_cpp_splits_text_as_we_do(llama_cpp: Baseline) -> None:
    """Guards the vocabulary: digits one by one, contractions, runs of spaces, other scripts."""
    text = "\n\n".join(TEXTS) + "  a  5 77\n\n\n  it's 3.14 \t caf\u00e9 \u6771\u4eac 12\u0663 x"
    connection = HTTPConnection(llama_cpp._address)  # type: ignore[attr-defined]  # no public door
    connection.request("POST", "/tokenize", json.dumps({"content": text}))
    tokens = json.load(connection.getresponse())["tokens"]
    assert tokens == load_tokenizer(shipped_folder()).encode(text)


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


@pytest.mark.parametrize(("dtype", "worst"), [("float16", 0.02), ("bfloat16", 0.3), ("q8_0", 1.0)])
def test_smaller_precisions_stay_close(
    model: TwoTower, tmp_path: Path, dtype: Precision, worst: float
) -> None:
    """Bounds are about twice what was seen; a wrong value is off by many units somewhere."""
    convert_to_gguf(shipped_folder(), tmp_path / "small.gguf", dtype)
    baseline = load_llama_cpp(tmp_path / "small.gguf", threads=1)
    assert baseline.dtype == dtype
    found = [difference(model, baseline, ids) for ids in prompts()]
    baseline.close()
    assert 1e-3 < max(found) < worst, found


def test_a_model_without_an_end_token_runs_on(tmp_path: Path) -> None:
    """Guards the length of replays: llama.cpp would take some token for the end."""
    model = fresh_model(hybrid_override_pattern="M*EM*")
    export_gguf(model, tmp_path / "tiny.gguf")
    baseline = load_llama_cpp(tmp_path / "tiny.gguf", threads=1)
    assert len(baseline.decode(random_ids(70).tolist(), 30).tokens) == 30
    baseline.close()
