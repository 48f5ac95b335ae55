"""From the context tower's logits to tokens, and to their log-probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.diffusion import (
    NOT_FINITE,
    Sampler,
    argmax,
    ban,
    choose,
    gumbel,
    require_finite,
)
from twotower.engine.batch import Chosen
from twotower.engine.constraints import choose_along, penalize
from twotower.engine.events import TokenLogprob
from twotower.engine.row import Row
from twotower.model import TwoTower
from twotower.model.draft_tree import DraftTree


def best_tokens(model: TwoTower, hidden: Tensor, unused_ids: Sequence[int]) -> Tensor:
    """The best token after each of the context tower's outputs hidden (..., D): (...) on the CPU,
    the lower one at a tie. ValueError if its logits are not finite.
    """
    ids = model.best_after(hidden, unused_ids)
    if ids is None:
        return argmax(ban(require_finite(model.context_head(hidden)), unused_ids)).cpu()
    if min(ids.flatten().tolist()) < 0:
        raise ValueError(NOT_FINITE)
    return ids


def choose_tokens(
    rows: Sequence[Row],
    logits: Tensor,
    sampler: Sampler,
    drafts: Sequence[list[int]] = (),
    tree: DraftTree | None = None,
) -> Tensor:
    """What rows choose from logits (B, n, V), by their own options and randomness: (B, n) on the
    CPU. drafts: what each supposes behind its first token; penalties count these, and under a
    grammar choices are made, as far as the draft agrees with them.
    """
    behind = drafts or [[]] * len(rows)
    if any(row.options.has_penalties for row in rows):
        logits = penalize(logits, rows, behind)
    noise = noise_of(rows, sampler, *logits.shape[1:])
    if noise is not None and tree is not None:  # that of a token's position in the text
        noise = torch.stack([own[depths] for own, depths in zip(noise, tree.depths, strict=True)])
    noise = None if noise is None else noise.to(logits.device)
    tokens = choose(require_finite(logits), sampler, noise).cpu()
    for slot, row in enumerate(rows):
        if row.grammar is not None:
            own = None if noise is None else noise[slot]
            kept = choose_along(row, behind[slot], logits[slot], sampler, slot, own)
            tokens[slot, : len(kept)] = torch.tensor(kept)
    return tokens


def noise_of(rows: Sequence[Row], sampler: Sampler, length: int, size: int) -> Tensor | None:
    """Gumbel noise (B, length, V) of the rows' next tokens, zeros for greedy rows; None if all are.

    Drawn once per token in the order of the text, whatever was drafted, so that a sampled text is
    the same in all passes.
    """
    if sampler.is_greedy:
        return None
    for row in rows:
        while row.options.temperature > 0 and len(row.noise_ahead) < length:
            row.noise_ahead.append(gumbel((size,), [row.generator])[0])
    greedy = torch.zeros(1, 1).expand(length, size)
    ahead = [row.noise_ahead[:length] for row in rows]
    return torch.stack([torch.stack(own) if own else greedy for own in ahead])


def with_logprobs(
    rows: Sequence[Row], logits: Tensor | None, tokens: Sequence[list[int]]
) -> list[Chosen]:
    """Each row's tokens, chosen from the first of logits (B, n, V), with their log-probabilities
    where it asked for them; logits None: no row did.
    """
    chosen = [Chosen(own) for own in tokens]
    for slot, (row, own) in enumerate(zip(rows, tokens, strict=True)):
        if row.options.logprobs is not None:
            assert logits is not None
            found = _logprobs(logits[slot], own, row.options.logprobs, row.unused_ids)
            chosen[slot] = Chosen(own, found)
    return chosen


def _logprobs(
    logits: Tensor, tokens: Sequence[int], num_top: int, unused_ids: Sequence[int]
) -> list[TokenLogprob]:
    """Of tokens under logits (n, V), n >= len(tokens), with the best alternatives, none of which
    is an unused id.
    """
    num_top = min(num_top, logits.shape[-1] - len(unused_ids))
    logprobs = logits[: len(tokens)].float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
    best, ids = ban(logprobs, unused_ids).topk(num_top, -1)
    each = zip(tokens, own.tolist(), ids.tolist(), best.tolist(), strict=True)
    return [
        TokenLogprob(token=token, logprob=logprob, top=tuple(zip(others, values, strict=True)))
        for token, logprob, others, values in each
    ]
