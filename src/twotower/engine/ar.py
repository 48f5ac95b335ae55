"""mode="ar": the context tower chooses token by token. Source: system.md section 4, 'AR'."""

from twotower.engine.batch import Batch, Chosen, DecodingMode
from twotower.engine.verify import newest_alone, start, verify


def choose(batch: Batch) -> list[Chosen]:
    """The next token of each row; several where the backend chooses."""
    return verify(batch, most_steps=max(row.num_left for row in batch.rows))


AR = DecodingMode(choose=choose, draft=newest_alone, start=start, num_unread=1)
