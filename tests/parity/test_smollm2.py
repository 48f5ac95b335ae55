"""A real model: SmolLM2-135M-Instruct from its GGUF file, against `transformers` and llama.cpp.

scripts/fetch_smollm2.py gets the file; without it these tests are skipped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from packed_groups import packed_groups
from twotower import GenerateOptions, Tokenizer, TwoTower, accelerate, generate, load_tokenizer
from twotower.checkpoint import load_checkpoint
from twotower.native import library

FILE = Path.home() / ".cache/twotower/models/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason="no SmolLM2 here: python scripts/fetch_smollm2.py"
)
QUESTIONS = [
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
]


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return load_checkpoint(FILE, towers="context")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(FILE)


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    transformers = pytest.importorskip("transformers")
    yield transformers.AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    ).eval()


def prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(text, allow_special=True)


def test_the_architecture(model: TwoTower) -> None:
    assert model.config.context.pattern == "*-" * 30
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.mask_token_id == 49152
    assert model.config.eos_token_ids == (2, 0)  # 0, <|endoftext|>, by its name, as in llama.cpp


@torch.no_grad()
def test_logits_are_those_of_transformers(
    model: TwoTower, tokenizer: Tokenizer, theirs: Any
) -> None:
    for question in QUESTIONS:
        ids = torch.tensor([prompt(tokenizer, question)])
        expected = theirs(ids).logits
        assert (model.context_logits(ids) - expected).abs().max() < 1e-4 * expected.std()


@torch.no_grad()
def test_greedy_texts_are_those_of_transformers(
    model: TwoTower, tokenizer: Tokenizer, theirs: Any
) -> None:
    prompts = [prompt(tokenizer, question) for question in QUESTIONS]
    found = generate(model, prompts, GenerateOptions(mode="ar", max_new_tokens=12))
    for ids, completion in zip(prompts, found, strict=True):
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert completion.tokens == expected[0, len(ids) :].tolist()


@pytest.fixture
def compiled() -> None:
    try:
        library.library()
    except OSError as error:
        pytest.skip(f"no native library: {error}")


@torch.no_grad()
def test_native_passes(model: TwoTower, tokenizer: Tokenizer, theirs: Any, compiled: None) -> None:
    """Silent failure: a real model has a size, an outlier or a position that no tiny one has."""
    prompts = [prompt(tokenizer, question) for question in QUESTIONS]
    ours = accelerate(model, "native")
    found = generate(ours, prompts, GenerateOptions(mode="ar", max_new_tokens=16))
    for ids, completion in zip(prompts, found, strict=True):
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
        assert completion.tokens == expected[0, len(ids) :].tolist()
    text = torch.tensor([[*prompts[0], *prompts[1]] * 3])
    expected = theirs(text).logits
    hidden = ours.extend(ours.empty_cache(1), text)
    assert (ours.context_head(hidden) - expected).abs().max() < 1e-4 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_native_passes_in_few_bits(
    model: TwoTower, tokenizer: Tokenizer, quantization: str, compiled: None
) -> None:
    """Silent failure: tokens whose outliers drown the rest in one scale; bits that depend on how
    many tokens a pass has, so that speculation changes texts."""
    ours = accelerate(model, "native", quantization)  # type: ignore[arg-type]
    text = torch.tensor([prompt(tokenizer, QUESTIONS[0]) + prompt(tokenizer, QUESTIONS[1])])
    hidden = ours.extend(ours.empty_cache(1), text)
    expected = model.context_logits(text)
    found = ours.context_head(hidden)
    assert (found - expected).square().mean().sqrt() < 0.09 * expected.std()
    cache = ours.prefill(text[:, :20])
    alone = [ours.extend(cache, token) for token in text[:, 20:40].split(1, dim=1)]
    assert torch.equal(torch.cat(alone, dim=1), hidden[:, 20:40])


def test_lookup_writes_the_text_of_ar_in_fewer_passes(
    model: TwoTower, tokenizer: Tokenizer, compiled: None
) -> None:
    """Silent failure: drafts that are never found, or never right, on a real model's text."""
    ours = accelerate(model, "native", "int4")
    ids = prompt(tokenizer, "Tom has 3 apples and buys 4 more apples. How many apples has Tom?")
    shape = {"max_new_tokens": 64, "temperature": 0.0}
    (expected,) = generate(ours, [ids], GenerateOptions(mode="ar", **shape))  # type: ignore[arg-type]
    (found,) = generate(ours, [ids], GenerateOptions(**shape))  # type: ignore[arg-type]
    assert found.tokens == expected.tokens
    assert found.context_forwards == expected.context_forwards - found.lookup_tokens
    assert found.lookup_tokens > 0.15 * len(found.tokens)


def test_the_file_is_kept_exactly_in_int4(model: TwoTower) -> None:
    """Silent failure: 4 bits of the file become other 4 bits."""
    for layer in (0, 1, 58, 59):
        for name, weight in model.context_tower.layers[layer].named_parameters():
            if name.endswith("_proj.weight"):
                kept = packed_groups(weight).values()
                assert (kept - weight).abs().max() < 1e-6 * weight.abs().max(), (layer, name)


def test_texts_come_back(tokenizer: Tokenizer) -> None:
    for text in (
        "12345 na\u00efve \u65e5\u672c\u8a9e  don't\t\tx\n\n",
        "a" * 100,
        "\U0001f389 <|im_end|>",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
