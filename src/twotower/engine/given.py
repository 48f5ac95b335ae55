"""Rows whose text is given: the context tower reads it and says how probable each token is."""

import torch

from twotower.diffusion import require_finite
from twotower.engine.batch import Batch, Chosen, DecodingMode, padded
from twotower.engine.logits import with_logprobs

_TOKENS = 32  # that are read at a time: each has logits of the size of the vocabulary


def choose(batch: Batch) -> list[Chosen]:
    """The next given tokens of each row."""
    tokens = [list(row.given[len(row.tokens) :][:_TOKENS]) for row in batch.rows]
    ids, counts = padded(tokens)
    output = batch.model.verify(batch.cache, ids, counts)
    first = batch.model.next_logits(batch.cache).unsqueeze(1)
    logits = torch.cat([first, batch.model.context_head(output.hidden[:, :-1])], dim=1)
    chosen = with_logprobs(batch.rows, require_finite(logits), tokens)
    batch.commit(output, counts)
    return chosen


GIVEN = DecodingMode(choose=choose)
