"""Between the model and the choice of tokens: a guard, log-probabilities, penalties, grammars."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.diffusion import Sampler, ban, choose, draw_noise
from twotower.engine.events import TokenLogprob
from twotower.engine.request import Row


def require_finite(logits: Tensor) -> Tensor:
    """The logits themselves; ValueError if any is NaN or infinite, which argmax would hide."""
    # A finite sum has finite terms, and is found in a fifth of the time.
    if not bool(torch.isfinite(logits.sum())) and not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "the model's logits are not finite; its weights are damaged or too large for its "
            "dtype: check the checkpoint, or load it with dtype=float32"
        )
    return logits


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


def penalize(logits: Tensor, rows: Sequence[Row], drafts: Sequence[list[int]]) -> Tensor:
    """The rows' logits (B, n, V) under their penalties and biases. drafts: of each row, at most
    n - 1 tokens that are text when the second and later places are chosen; places behind them stay.

    A place's penalties are worked out from the tokens before it, in the same steps for one place as
    for many, so that a verified draft gives what decoding token by token gives.
    """
    if not any(row.options.has_penalties for row in rows):
        return logits
    logits = logits.clone()
    for row, own, draft in zip(rows, logits, drafts, strict=True):
        if row.options.has_penalties:
            for place in range(len(draft) + 1):
                _penalize_one(own[place], row, row.tokens + draft[:place])
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


def choose_tokens(logits: Tensor, rows: Sequence[Row], sampler: Sampler) -> Tensor:
    """One token per row from its logits (B, V), by the row's own options and randomness: (B,)."""
    logits = penalize(logits.unsqueeze(1), rows, [[]] * len(rows)).squeeze(1)
    noise = draw_noise(logits, sampler, [row.generator for row in rows])
    tokens = choose(require_finite(logits), sampler, noise)
    for place, row in enumerate(rows):
        if row.grammar is not None:
            row.grammar.follow(row.tokens)
            own = None if noise is None else noise[place]
            tokens[place] = choose_allowed(row, logits[place], sampler, place, own)
    return tokens


def choose_allowed(
    row: Row, logits: Tensor, sampler: Sampler, place: int, noise: Tensor | None
) -> int:
    """The token that a row with a grammar chooses from logits (V,): among those it allows next.

    place: of the row in the sampler. noise (V,): as for `choose`; None when no row samples.
    """
    assert row.grammar is not None
    allowed = row.grammar.restrict(logits)
    own = sampler.select(torch.tensor([place]))
    return int(choose(allowed.unsqueeze(0), own, None if noise is None else noise.unsqueeze(0)))
