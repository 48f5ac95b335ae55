"""mode="ar": the context tower chooses token by token. Source: system.md section 4, 'AR'."""

import torch
from torch import Tensor

from twotower.engine.batch import Batch, Chosen, DecodingMode, Draft
from twotower.engine.logits import best_tokens, choose_tokens, with_logprobs
from twotower.engine.verify import verify


def start(batch: Batch) -> list[Chosen]:
    """The first token of each row, from what the context tower said of its prompt's last one."""
    return _next(batch, batch.model.next_logits(batch.cache).unsqueeze(1))


def choose(batch: Batch) -> list[Chosen]:
    """The token after each row's newest; several where the backend chooses."""
    if batch.chooser is not None:
        batch.drafts = [Draft(row.tokens[-1:]) for row in batch.rows]  # of nothing
        return verify(batch, most_steps=max(row.num_left for row in batch.rows))
    newest = torch.tensor([row.tokens[-1:] for row in batch.rows])
    output = batch.model.verify(batch.cache, newest, None, False)
    if batch.is_plain:
        best = best_tokens(batch.model, output.hidden, batch.sampler.unused_ids)
        chosen = [Chosen(own) for own in best.tolist()]
    else:
        chosen = _next(batch, batch.model.context_head(output.hidden))
    batch.commit(output, torch.ones(len(batch.rows), dtype=torch.int64))
    return chosen


def _next(batch: Batch, logits: Tensor) -> list[Chosen]:
    """What the rows choose from logits (B, 1, V)."""
    tokens = choose_tokens(batch.rows, logits, batch.sampler).tolist()
    return with_logprobs(batch.rows, logits, tokens)


AR = DecodingMode(choose=choose, start=start, num_unread=1)
