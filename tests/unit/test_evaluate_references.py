"""Likelihood of reference answers: what is scored, and how answers are added up."""

import math

import pytest
import torch

from tiny_models import fresh_model, tiny_config, tiny_model
from tiny_text import ids_of, tiny_tokenizer
from twotower import TwoTower
from twotower.lab.corpus import Document
from twotower.lab.evaluate.likelihood import (
    NOISINGS,
    Bound,
    Reference,
    Score,
    answer_ids,
    bound_text,
    score_references,
    score_texts,
    summarise_references,
)

EOS = 2


def document(prompt: str, completion: str) -> Document:
    return Document(category="math", prompt=prompt, completion=completion, key="", answer={})


def test_an_answer_ends_in_eos_that_fill_its_last_block() -> None:
    tokenizer = tiny_tokenizer()
    (word,) = ids_of("abc")
    assert answer_ids(tokenizer, "abc", 4) == ([word, EOS], [EOS, EOS])
    assert answer_ids(tokenizer, "abc", 2) == ([word, EOS], [])


def test_both_towers_score_the_same_answer_after_the_same_prompt() -> None:
    """Silent failure: the bound is of another text than the likelihood beside it."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    (prompt,), (word,) = ids_of("ab"), ids_of("ca")
    (found,) = score_references(model, tokenizer, [document("ab", "ca")], seed=7)
    (score,) = score_texts(model, [[1, prompt]], [[word, EOS]])
    generator = torch.Generator().manual_seed(7)
    bound = bound_text(model, [1, prompt], [word, EOS, EOS, EOS], NOISINGS, generator)
    assert found == Reference(category="math", score=score, bound=bound)


def test_without_a_denoiser_there_is_no_bound() -> None:
    model = TwoTower(tiny_config(), towers="context").eval()
    model.load_state_dict(fresh_model().state_dict(), strict=False)
    (found,) = score_references(model, tiny_tokenizer(), [document("ab", "ca")], seed=0)
    record = summarise_references([found])["all"]
    assert record["bound_nats_per_token"] is None and record["bound_standard_error"] is None
    assert record["ar_nats_per_token"] == pytest.approx(-found.score.log_likelihood / 2)


def reference(category: str, tokens: int, log_likelihood: float, error: float) -> Reference:
    score = Score(log_likelihood=log_likelihood, is_greedy=False, num_tokens=tokens)
    bound = Bound(nats=10.0, standard_error=error)
    return Reference(category=category, score=score, bound=bound)


def test_answers_add_up_by_tokens() -> None:
    """Silent failure: a mean of means, in which short answers weigh as much as long ones."""
    references = [
        reference("math", 2, -4.0, 0.3),
        reference("code", 5, -5.0, 0.0),
        reference("math", 8, -1.0, 0.4),
    ]
    record = summarise_references(references)
    assert record["noisings"] == NOISINGS and list(record["categories"]) == ["math", "code"]
    assert record["categories"]["math"] == {
        "n": 2,
        "tokens": 10,
        "ar_nats_per_token": 0.5,
        "bound_nats_per_token": 2.0,
        "bound_standard_error": pytest.approx(0.05),  # sqrt(0.09 + 0.16) / 10
    }
    assert record["all"]["ar_nats_per_token"] == pytest.approx(10 / 15)
    assert math.isclose(record["all"]["bound_nats_per_token"], 2.0)
