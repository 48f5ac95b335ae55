"""mode="ar": the context tower chooses token by token. Source: system.md section 4, 'AR'."""

from twotower.engine.batch import Batch, Choice, DecodingMode
from twotower.engine.logits import choose_tokens, rows_logprobs


def choose(batch: Batch) -> Choice:
    """The next token of each row, from what the context tower said of its last one."""
    logits = batch.model.next_logits(batch.cache)
    tokens = [[token] for token in choose_tokens(logits, batch.rows, batch.sampler).tolist()]
    return Choice(tokens, rows_logprobs(batch.rows, logits.unsqueeze(1), tokens))


AR = DecodingMode(choose=choose)
