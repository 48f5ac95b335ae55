"""How probable a given text is: exactly under the context tower, by a bound under the denoiser.

Both condition on a prompt. Nothing here generates. The suite's reference answers are scored with
the eos that ends them.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.arguments import require
from twotower.diffusion.loss import token_cross_entropy
from twotower.engine.request import known_ids
from twotower.lab.corpus import Document
from twotower.model import TwoTower
from twotower.model.rows import select_rows
from twotower.tokenizer import Tokenizer

CHUNK = 256  # tokens whose logits are held at a time
NOISINGS = 32  # random masks per block


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-likelihood of a text in nats; `is_greedy`: greedy decoding would write exactly it."""

    log_likelihood: float
    is_greedy: bool
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Upper bound of the negative log-likelihood in nats, estimated from some noisings."""

    nats: float
    standard_error: float


@torch.no_grad()
def score_texts(
    model: TwoTower, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[Score]:
    """Log-likelihood of each text after its prompt (>= 1 token) under the context tower.

    Rows of different lengths share passes, right-padded, `CHUNK` tokens at a time through the
    cache: exact at any length. What all prompts begin with is read once. ValueError for lists of
    other lengths, and for no or unknown tokens.
    """
    require("model", model, TwoTower, "twotower.load_model(path)")
    for name, lists in (("prompts", prompts), ("texts", texts)):
        require(name, lists, (list, tuple), "a list of lists of token ids")
        for one in lists:
            require(name, one, (list, tuple), "a list of lists of token ids")
    if len(prompts) != len(texts):
        raise ValueError(f"texts: {len(texts)} given for {len(prompts)} prompts; give one for each")
    rows = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = known_ids(model, f"prompt {number}", prompt)
        rows.append([*ids, *known_ids(model, f"text {number}", text)])
    if not rows:
        return []
    first = min(map(len, prompts)) - 1  # position i scores token i + 1
    losses, hits = _row_losses(model, rows, first)
    scores = []
    for row, prompt, text in zip(range(len(rows)), prompts, texts, strict=True):
        begin = len(prompt) - 1 - first
        span = slice(begin, begin + len(text))
        scores.append(
            Score(
                log_likelihood=-float(losses[row, span].double().sum()),
                is_greedy=bool(hits[row, span].all()),
                num_tokens=len(text),
            )
        )
    return scores


def _row_losses(
    model: TwoTower, rows: Sequence[Sequence[int]], first: int
) -> tuple[Tensor, Tensor]:
    """Nats of token i + 1 after tokens up to i, from i = first on, and whether it is the most
    probable: (B, L - 1 - first).
    """
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    shared = int((ids[:, :first] == ids[0, :first]).all(0).cumprod(0).sum())
    cache = model.prefill(ids[:1, :shared]) if shared else model.empty_cache(1)
    if len(rows) > 1:
        cache = select_rows(cache, torch.zeros(len(rows), dtype=torch.int64))
    losses, hits = [], []
    for start, stop in _pieces(shared, first, ids.shape[1] - 1):
        counts = (lengths - start).clamp(0, stop - start)
        hidden = model.extend(cache, ids[:, start:stop].to(model.context_device), counts)
        if start >= first:
            logits = model.context_head(hidden)
            targets = ids[:, start + 1 : stop + 1].to(logits.device)
            losses.append(token_cross_entropy(logits, targets))
            hits.append(logits.argmax(-1) == targets)
    return torch.cat(losses, dim=1).cpu(), torch.cat(hits, dim=1).cpu()


def _pieces(*borders: int) -> Iterator[tuple[int, int]]:
    """The positions between borders, at most `CHUNK` at a time."""
    for begin, end in itertools.pairwise(borders):
        for start in range(begin, end, CHUNK):
            yield start, min(start + CHUNK, end)


@torch.no_grad()
def bound_text(
    model: TwoTower,
    prompt: Sequence[int],
    text: Sequence[int],
    samples: int,
    generator: torch.Generator,
) -> Bound:
    """The masked-diffusion bound of `text` after `prompt` (>= 1 token), block by block.

    Per block of T tokens and sample: n uniform in 1..T, n positions masked, T/n times the sum of
    their cross-entropies, the denoiser conditioned on n/T as in generation. In expectation this is
    the integral over t of system.md section 5. The last block may be shorter.
    """
    if not prompt or not text or samples < 2:
        raise ValueError("prompt and text need a token each, and samples must be at least 2")
    cache = model.prefill(torch.tensor([list(prompt)]))
    totals = torch.zeros(samples, dtype=torch.float64)
    size = model.config.block_size
    for start in range(0, len(text), size):
        block = torch.tensor([list(text[start : start + size])])
        view = cache.view().select(torch.zeros(samples, dtype=torch.int64))
        is_masked, weight = draw_masks(samples, block.shape[1], generator)
        noisy = block.expand(samples, -1).masked_fill(is_masked, model.config.mask_token_id)
        logits = model.denoise(noisy, view, is_masked.float().mean(1)).cpu()
        losses = token_cross_entropy(logits, block.expand(samples, -1)).double()
        totals += weight * losses.masked_fill(~is_masked, 0.0).sum(1)
        model.extend(cache, block)
    error = float(totals.std()) / math.sqrt(samples)
    return Bound(nats=float(totals.mean()), standard_error=error)


def draw_masks(samples: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`samples` random sets of 1 to `length` positions (B, T) bool, and T over each one's size."""
    count = torch.randint(1, length + 1, (samples, 1), generator=generator)
    order = torch.rand(samples, length, generator=generator).argsort(1).argsort(1)
    return order < count, length / count.squeeze(1).double()


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
    """The answer with its eos, and the eos that fill its last block, which are no part of it."""
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
