"""The baselines: they write our greedy text, their clocks are right, libraries may miss."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from next_logprobs import next_logprobs
from twotower.checkpoint import convert_to_gguf, export_transformers, load_checkpoint
from twotower.checkpoint.files import shipped_folder
from twotower.engine import GenerateOptions, generate
from twotower.lab.bench.baselines import (
    Baseline,
    LlamaCpp,
    MissingBaseline,
    Transformers,
)
from twotower.tokenizer import load_tokenizer

TEXTS = ["Translate to German: The cat", "def add(a, b):\n", "12 + 30 ="]


@pytest.fixture(scope="module", params=["transformers", "xllamacpp"])
def baseline(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Baseline]:
    """Each baseline on the shipped model in float32, one thread."""
    pytest.importorskip(request.param)
    place = tmp_path_factory.mktemp("baseline") / "model"
    if request.param == "transformers":
        export_transformers(load_checkpoint(shipped_folder(), towers="context"), place)
        loaded = Transformers(place, threads=1)
    else:
        convert_to_gguf(shipped_folder(), place, "float32")
        loaded = LlamaCpp(place, threads=1)
    yield loaded
    loaded.close()


def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(shipped_folder())
    return [tokenizer.encode(text, add_bos=True) for text in TEXTS]


def test_a_baseline_computes_and_writes_what_we_do(baseline: Baseline) -> None:
    """Guards both of a baseline's paths, whole prompt and cached step, and its end of text."""
    model = load_checkpoint(shipped_folder(), dtype=torch.float32, towers="context")
    ours = generate(model, prompts(), GenerateOptions(mode="ar", max_new_tokens=20))
    assert {completion.finish_reason for completion in ours} == {"eos", "length"}
    for ids, completion in zip(prompts(), ours, strict=True):
        assert baseline.decode(ids, 20).tokens == completion.tokens
        with torch.no_grad():
            expected = model.context_logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
        found = next_logprobs(baseline, ids, model.config.vocab_size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_clock_of_a_baseline(baseline: Baseline) -> None:
    """Guards units, and prefill that is counted as decoding."""
    ids = prompts()[0] * 30
    for num_new in (2, 2, 16):
        start = time.perf_counter()
        found = baseline.decode(ids, num_new)
        elapsed = time.perf_counter() - start
        assert 0.5 * elapsed < found.seconds < elapsed + 0.002
        steps = len(found.tokens) - 1
        # Prefill of 300 tokens costs far more than two steps.
        assert 2 * found.decode_seconds / steps < found.seconds - found.decode_seconds


def test_threads_of_others_are_left_alone(baseline: Baseline) -> None:
    """Guards our own modes in the same process: a baseline may not change their thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        baseline.decode(prompts()[0], 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("library", ["transformers", "xllamacpp"])
def test_a_missing_library_is_said(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    load = Transformers if library == "transformers" else LlamaCpp
    with pytest.raises(
        MissingBaseline, match=rf'^{library} is not installed: pip install "\.\[bench\]"'
    ):
        load(tmp_path, 1)


def test_bad_files_and_long_prompts_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    (tmp_path / "a.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"a\.gguf: not a GGUF file of a language model"):
        LlamaCpp(tmp_path / "a.gguf", 1)
    convert_to_gguf(shipped_folder(), tmp_path / "b.gguf", "q8_0")
    loaded = LlamaCpp(tmp_path / "b.gguf", 1)
    with pytest.raises(ValueError, match="prompt of 4000 tokens and num_new=97 exceed the 4096"):
        loaded.decode([5] * 4000, 97)
    with pytest.raises(ValueError, match=r"^llama\.cpp: "):
        loaded.decode([99999], 2)
    loaded.close()
