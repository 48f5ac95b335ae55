"""The thin denoiser of the shipped model that comes with the repository."""

from pathlib import Path

import pytest
import torch

import twotower

FOLDER = Path(__file__).parents[2] / "models" / "shipped-thin"
PROMPTS = ["Q: What is 25 + 99?\nA:", "Q: What is the capital of France?\nA:"]


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_text_is_ar_s_and_drafts_are_of_use(quantization: str) -> None:
    """Silent failure: what is shipped no longer fits the weights inside the package, which a
    lossless mode hides: texts stay right, and no draft is.
    """
    torch.set_num_threads(1)
    folder = Path(twotower.__file__).parent / "assets"
    words = twotower.load_tokenizer(str(folder))
    model = twotower.load_model(denoiser=str(FOLDER), quantization=quantization)
    found = {}
    for mode in ("ar", "speculative"):
        options = twotower.GenerateOptions(mode=mode, max_new_tokens=48)  # type: ignore[arg-type]
        found[mode] = twotower.generate(model, PROMPTS, options, words)
    assert [c.tokens for c in found["speculative"]] == [c.tokens for c in found["ar"]]
    first = found["speculative"][0]
    assert len(first.tokens) / first.nfe > 4
