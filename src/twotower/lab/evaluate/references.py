"""How probable a model finds the suite's reference answers, category by category.

Decides what an answer is made of; `likelihood` does the sums.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from twotower.lab.corpus import Document
from twotower.lab.evaluate.likelihood import Bound, Score, bound_text, score_texts
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

NOISINGS = 32  # random masks per block


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One reference answer under both towers; `bound` is None without a denoiser."""

    category: str
    score: Score
    bound: Bound | None


def score_references(
    model: TwoTower, tokenizer: Tokenizer, documents: Sequence[Document], seed: int
) -> Iterator[Reference]:
    """Yield each document's reference after its prompt, in order."""
    generator = torch.Generator().manual_seed(seed)
    for document in documents:
        prompt = tokenizer.encode_prompt(document.prompt)
        text, fill = answer_ids(tokenizer, document.completion, model.config.block_size)
        bound = None
        if model.denoiser_tower is not None:
            bound = bound_text(model, prompt, [*text, *fill], NOISINGS, generator)
        (score,) = score_texts(model, [prompt], [text])
        yield Reference(category=document.category, score=score, bound=bound)


def answer_ids(
    tokenizer: Tokenizer, completion: str, block_size: int
) -> tuple[list[int], list[int]]:
    """The answer with its eos, and the eos that fill its last block, as a denoiser is trained.

    What follows the first eos is no part of the answer: the fill can only raise the bound.
    """
    text = tokenizer.encode(completion)
    if tokenizer.eos_id is None:
        return text, []
    text.append(tokenizer.eos_id)
    return text, [tokenizer.eos_id] * (-len(text) % block_size)


def summarise_references(references: Sequence[Reference]) -> dict[str, object]:
    """`likelihood` of the record: nats per token of the answers, by category and in all."""
    categories = dict.fromkeys(reference.category for reference in references)
    return {
        "noisings": NOISINGS,
        "categories": {
            category: _summary([r for r in references if r.category == category])
            for category in categories
        },
        "all": _summary(references),
    }


def _summary(references: Sequence[Reference]) -> dict[str, object]:
    """Sums over answers, divided by all their tokens; the error is that of the noisings alone."""
    tokens = sum(reference.score.num_tokens for reference in references)
    bounds = [reference.bound for reference in references if reference.bound is not None]
    variance = sum(bound.standard_error**2 for bound in bounds)
    return {
        "n": len(references),
        "tokens": tokens,
        "ar_nats_per_token": -sum(r.score.log_likelihood for r in references) / tokens,
        "bound_nats_per_token": sum(b.nats for b in bounds) / tokens if bounds else None,
        "bound_standard_error": math.sqrt(variance) / tokens if bounds else None,
    }
