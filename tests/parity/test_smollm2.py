"""A real model: SmolLM2-135M-Instruct from its GGUF file, against `transformers` and llama.cpp.

scripts/fetch_smollm2.py gets the file; without it these tests are skipped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower import GenerateOptions, Tokenizer, TwoTower, generate, load_tokenizer
from twotower.checkpoint import load_checkpoint

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
    assert model.config.eos_token_ids == (2,) and model.config.mask_token_id == 49152


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


def test_texts_come_back(tokenizer: Tokenizer) -> None:
    for text in (
        "12345 na\u00efve \u65e5\u672c\u8a9e  don't\t\tx\n\n",
        "a" * 100,
        "\U0001f389 <|im_end|>",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
