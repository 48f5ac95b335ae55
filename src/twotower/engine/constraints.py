"""What a request adds to the model's logits: penalties, biases, and a grammar's tokens alone."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.diffusion import Sampler, choose
from twotower.engine.row import Row


def penalize(logits: Tensor, rows: Sequence[Row], drafts: Sequence[list[int]]) -> Tensor:
    """The rows' logits (B, n, V) under their penalties and biases. drafts: of each row, at most
    n - 1 tokens that are text when the second and later positions are chosen; those behind stay.

    A position's penalties are worked out from the tokens before it, in the same steps for one
    position as for many, so that a verified draft gives what decoding token by token gives.
    """
    logits = logits.clone()
    for row, own, draft in zip(rows, logits, drafts, strict=True):
        if row.options.has_penalties:
            for count in range(len(draft) + 1):
                _penalize_one(own[count], row, row.tokens + draft[:count])
    return logits


def _penalize_one(logits: Tensor, row: Row, text: list[int]) -> None:
    """Change the logits (V,) of the token behind a row's new text: in order a bias, the repetition
    penalty on all tokens that came before, the other two on those of the new text.
    """
    options, device = row.options, logits.device
    if options.logit_bias:
        ids, biases = zip(*options.logit_bias, strict=True)
        added = torch.tensor(biases, dtype=logits.dtype, device=device)
        logits.index_add_(0, torch.tensor(ids, device=device), added)
    if options.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt, *text}), device=device)
        found, by = logits[seen], options.repetition_penalty
        logits[seen] = torch.where(found > 0, found / by, found * by)
    if text:
        counts = Counter(text)
        penalties = [
            options.presence_penalty + options.frequency_penalty * n for n in counts.values()
        ]
        lost = torch.tensor(penalties, dtype=logits.dtype, device=device)
        logits[torch.tensor(list(counts), device=device)] -= lost


def choose_along(
    row: Row,
    draft: Sequence[int],
    logits: Tensor,
    sampler: Sampler,
    slot: int,
    noise: Tensor | None,
) -> list[int]:
    """What a row with a grammar chooses from left to right, each token among those that may follow
    the ones before it, up to the first that its draft does not have.

    slot: of the row in the sampler. logits, noise (n, V), n > len(draft); None when no row samples.
    """
    assert row.grammar is not None
    chosen, own = list[int](), sampler.select(torch.tensor([slot]))
    for at, following in enumerate([*draft, None]):
        row.grammar.follow(row.tokens + chosen)
        allowed = row.grammar.restrict(logits[at]).unsqueeze(0)
        chosen.append(int(choose(allowed, own, None if noise is None else noise[at].unsqueeze(0))))
        if chosen[-1] != following or chosen[-1] in row.options.eos_token_id:
            break
    return chosen
