"""From the context tower's logits to tokens, and to their log-probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.diffusion import Sampler, ban, choose, draw_noise, require_finite
from twotower.engine.batch import Chosen
from twotower.engine.constraints import choose_along, penalize
from twotower.engine.events import TokenLogprob
from twotower.engine.row import Row


def with_logprobs(
    rows: Sequence[Row], logits: Tensor | None, tokens: Sequence[list[int]]
) -> list[Chosen]:
    """Each row's tokens, chosen from the first of logits (B, n, V), with their log-probabilities
    where it asked for them; logits None: no row did.
    """
    chosen = [Chosen(own) for own in tokens]
    for slot, (row, own) in enumerate(zip(rows, tokens, strict=True)):
        if (num_top := row.options.logprobs) is not None:
            assert logits is not None
            logprobs = token_logprobs(logits[slot], own, num_top, row.unused_ids)
            chosen[slot] = Chosen(own, logprobs)
    return chosen


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], num_top: int, unused_ids: Sequence[int] = ()
) -> list[TokenLogprob]:
    """How probable tokens are under logits (n, V), n >= len(tokens), with the best alternatives;
    unused ids, which are no token, are none of these.
    """
    num_top = min(num_top, logits.shape[-1] - len(unused_ids))
    logprobs = logits[: len(tokens)].float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
    best, ids = ban(logprobs, unused_ids).topk(num_top, -1)
    return [
        TokenLogprob(token=token, logprob=logprob, top=tuple(zip(others, values, strict=True)))
        for token, logprob, others, values in zip(
            tokens, own.tolist(), ids.tolist(), best.tolist(), strict=True
        )
    ]


def choose_tokens(logits: Tensor, rows: Sequence[Row], sampler: Sampler) -> Tensor:
    """One token per row from its logits (B, V), by the row's own options and randomness: (B,)."""
    if any(row.options.has_penalties for row in rows):
        logits = penalize(logits.unsqueeze(1), rows, [[]] * len(rows)).squeeze(1)
    noise = None
    if not sampler.is_greedy:
        noise = draw_noise(logits, sampler, [row.generator for row in rows])
    tokens = choose(require_finite(logits), sampler, noise)
    for slot, row in enumerate(rows):
        if row.grammar is not None:
            own = None if noise is None else noise[slot : slot + 1]
            (tokens[slot],) = choose_along(row, [], logits[slot : slot + 1], sampler, slot, own)
    return tokens
