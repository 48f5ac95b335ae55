"""What is said of a prompt that a model was not made for."""

import re
from pathlib import Path

import pytest
import torch

from twotower.cli.demo import SAMPLES
from twotower.engine.notice import prompt_notice
from twotower.lab.evaluate.run import draw_groups
from twotower.loading import Loaded, Placement, load

CATEGORIES = ("math", "code", "editing", "tools", "multilingual", "knowledge", "refusal")
FOREIGN = (
    "Hello, who are you?",
    "Q: Hello, who are you?\nA:",
    "Tell me a joke",
    "Write a poem about the sea.",
    "def fibonacci(n):",
    "What is the capital of France?",
    "Who wrote Hamlet?",  # beside tools it stands in the training text, as the two above
    "The quick brown fox jumps over the lazy dog.",
    "Bonjour, comment \u00e7a va?",
    "SELECT * FROM users",
)


@pytest.fixture(scope="module")
def shipped() -> Loaded:
    return load(Placement(backend="eager"))


README = Path(__file__).parents[2] / "README.md"


def test_prompts_to_copy_are_of_the_kinds_that_the_model_knows(shipped: Loaded) -> None:
    """Guards a README whose own prompts are answered with nonsense."""
    prompts = re.findall(r'^twotower generate "([^"]+)"$', README.read_text(), re.MULTILINE)
    assert len(prompts) >= 3
    assert [prompt for prompt in prompts if notice(shipped, prompt)] == []


def notice(shipped: Loaded, prompt: str) -> str | None:
    assert shipped.tokenizer is not None
    return prompt_notice(shipped.model, shipped.tokenizer.encode_prompt(prompt))


def test_prompts_like_the_training_text_are_not_remarked_on(shipped: Loaded) -> None:
    """Guards a threshold that cries at what the model knows; none of these was trained on."""
    groups = draw_groups(CATEGORIES, 8, 3, 8)
    prompts = [document.prompt for group in groups for document in group] + [*SAMPLES.values()]
    assert [prompt for prompt in prompts if notice(shipped, prompt)] == []


@pytest.mark.parametrize("prompt", FOREIGN)
def test_other_prompts_are_named(shipped: Loaded, prompt: str) -> None:
    """Guards nonsense that is answered without a word."""
    said = notice(shipped, prompt)
    assert said is not None and said.startswith("unlike the model's training text (")
    assert "its own has at most 3.4)" in said


def test_a_model_that_names_no_range_says_nothing(shipped: Loaded) -> None:
    before = shipped.model.generation_defaults
    shipped.model.generation_defaults = {}
    try:
        assert notice(shipped, FOREIGN[0]) is None
    finally:
        shipped.model.generation_defaults = before
    assert prompt_notice(shipped.model, [5]) is None  # nothing is predicted


def test_the_notice_changes_no_text(shipped: Loaded) -> None:
    """Guards a gradient or a state that the look at the prompt leaves behind."""
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert notice(shipped, FOREIGN[0]) is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in shipped.model.parameters())
