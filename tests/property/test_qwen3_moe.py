"""Qwen3-MoE decodes, drafts and trains: by every backend, with every kind of denoiser."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import prompts_of, random_model
from tiny_qwen3_moe import tiny_config
from twotower import GenerateOptions, TwoTower, accelerate, generate
from twotower.adapt.answers import Question
from twotower.adapt.budget import Budget
from twotower.adapt.options import AnswerOptions, StepOptions, ThinOptions, WorkFolder
from twotower.adapt.run import collect_answers, first_denoiser, reads_of, train
from twotower.checkpoint import load_checkpoint, save_backbone
from twotower.checkpoint.denoiser import load_denoiser, save_denoiser, with_new_denoiser
from twotower.config import DraftSpec
from twotower.model.thin import thin_blocks, thin_config
from twotower.native import library

PROMPTS = prompts_of([7, 2, 11])
BACKENDS = ["eager none", "graphs none", "graphs int8", "native none", "native int8", "native int4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save_backbone(random_model(tiny_config()), made)
    return made


def backbone(folder: Path) -> TwoTower:
    return load_checkpoint(folder, towers="context")


def with_thin(model: TwoTower, reads: tuple[int, ...]) -> TwoTower:
    """A denoiser of copies of layers, whose other parts matter, too."""
    draft = DraftSpec(vocab_size=None, bigram_rank=4)
    made = with_new_denoiser(model, thin_config(model.config, reads, 6, draft), None, 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith(("context_", "lm_head")) and "embeddings" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def tokens(model: TwoTower, mode: Any) -> list[list[int]]:
    options = GenerateOptions(mode=mode, max_new_tokens=40, ignore_eos=True)
    return [list(found.tokens) for found in generate(model, PROMPTS, options)]


@pytest.mark.parametrize("denoiser", ["none", "attention", "experts", "full"])
@pytest.mark.parametrize("chosen", BACKENDS)
def test_speculation_writes_the_text_of_ar(folder: Path, chosen: str, denoiser: str) -> None:
    """Silent failure: a token's experts depend on the tokens beside it, so that a draft is verified
    by other numbers than a step's."""
    model = backbone(folder)
    if denoiser == "full":
        model = load_checkpoint(folder)  # both towers are the same
    elif denoiser != "none":
        model = with_thin(model, (2, 3, 4, 5) if denoiser == "experts" else (2, 4, 6))
    backend, quantization = chosen.split()
    if backend == "native":
        try:
            library.library()
        except OSError as error:
            pytest.skip(f"no native library: {error}")
    model = accelerate(model, backend, quantization)  # type: ignore[arg-type]
    assert tokens(model, "speculative") == tokens(model, "ar")
    if quantization == "none":
        assert tokens(model, "ar") == tokens(backbone(folder), "ar")


def test_a_thin_denoiser_has_no_experts_unless_they_are_named(folder: Path) -> None:
    """Silent failure: a "thin" denoiser of 30B-A3B has 1.9 billion weights."""
    config = tiny_config()
    assert thin_blocks(config.context) == [(0,), (2, 3), (4,), (6,)]
    assert reads_of(config, ThinOptions()) == [0, 2, 3, 6]
    made = first_denoiser(backbone(folder), ThinOptions(layers=2, draft_vocab=0), 0)
    assert not [name for name, _ in made.denoiser().named_parameters() if "experts" in name]


def test_adapt_from_answers_to_a_denoiser(folder: Path, tmp_path: Path) -> None:
    """Silent failure: features of a layer that the denoiser does not read, or a folder that does
    not fit the backbone that it was made for, also with its experts in files."""
    model, work = backbone(folder), WorkFolder(tmp_path / "work")
    questions = [Question(number=i, prompt=p, task="t") for i, p in enumerate(prompts_of([4] * 60))]
    shape, budget = ThinOptions(layers=3, draft_vocab=0), Budget(minutes=0.05)
    options = AnswerOptions(max_new_tokens=12)
    for _ in collect_answers(model, questions, work, shape, options, Budget(minutes=9)):
        pass
    work.spent.unlink()
    steps = StepOptions(answers_per_step=2, blocks_per_answer=4)
    list(train(model, work, shape, steps, budget, tmp_path / "thin", str(folder)))
    mapped = load_checkpoint(folder, towers="context", expert_storage="mmap")
    for one in (model, mapped):
        made = load_denoiser(one, tmp_path / "thin")
        assert made.config.reads == tuple(reads_of(model.config, shape))
        assert tokens(made, "speculative") == tokens(model, "ar")


def test_a_denoiser_of_experts_survives_its_folder(folder: Path, tmp_path: Path) -> None:
    """Silent failure: an expert's gate is lost between two folders, and drafts are nonsense."""
    made = with_thin(backbone(folder), (4, 5))
    save_denoiser(made, tmp_path / "thin", str(folder), dtype=torch.float32)
    again = load_denoiser(backbone(folder), tmp_path / "thin")
    expected = made.denoiser().state_dict()
    found = again.denoiser().state_dict()
    assert any("experts.gate_proj" in name for name in expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
