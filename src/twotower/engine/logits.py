"""From the context tower's logits to tokens, and to their log-probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.diffusion import Sampler, ban, choose, draw_noise, require_finite
from twotower.engine.constraints import choose_allowed, penalize
from twotower.engine.events import TokenLogprob
from twotower.engine.request import Row


def rows_logprobs(
    rows: Sequence[Row], logits: Tensor, tokens: Sequence[Sequence[int]]
) -> list[list[TokenLogprob] | None] | None:
    """Of each row's tokens, chosen from the first of logits (B, n, V), if it asked; None if no
    row did.
    """
    if all(row.options.logprobs is None for row in rows):
        return None
    return [
        None
        if (num_top := row.options.logprobs) is None
        else token_logprobs(one, own, num_top, row.unused_ids)
        for row, one, own in zip(rows, logits, tokens, strict=True)
    ]


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
    generators = [] if sampler.is_greedy else [row.generator for row in rows]
    noise = draw_noise(logits, sampler, generators)
    tokens = choose(require_finite(logits), sampler, noise)
    for slot, row in enumerate(rows):
        if row.grammar is not None:
            row.grammar.follow(row.tokens)
            own = None if noise is None else noise[slot]
            tokens[slot] = choose_allowed(row, logits[slot], sampler, slot, own)
    return tokens
