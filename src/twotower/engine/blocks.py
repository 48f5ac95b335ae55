"""The modes that fill blocks of mask tokens: diffusion, posterior, predict-and-noise.

The context tower may verify a block of mode="diffusion": it must read it anyway, and rejects
improbable tokens. Source: system.md section 4.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from twotower.diffusion import require_finite
from twotower.engine.batch import Batch, Chosen, DecodingMode, Draft
from twotower.engine.denoiser import fill_blocks
from twotower.engine.events import Event, Verified
from twotower.engine.logits import choose_tokens, with_logprobs


def draft(batch: Batch) -> Iterator[Event]:
    """One block of every row, from masked to all committed."""
    last = yield from fill_blocks(batch, _open_blocks(batch), batch.sampler)
    batch.drafts = [Draft(tokens) for tokens in last.tokens.tolist()]


def _open_blocks(batch: Batch) -> Tensor:
    """Blocks (B, T) before the first pass: masks, but for first tokens of the context tower."""
    rows, model = batch.rows, batch.model
    block_size = rows[0].options.block_size
    blocks = torch.full((len(rows), block_size), model.config.mask_token_id)
    slots = [i for i, row in enumerate(rows) if row.options.first_token == "context"]
    if slots and block_size > 1:  # a block needs something to fill
        logits = model.next_logits(batch.cache)[slots].unsqueeze(1)
        sampler = batch.sampler.select(torch.tensor(slots))
        blocks[slots, :1] = choose_tokens([rows[slot] for slot in slots], logits, sampler)
    return blocks


def choose(batch: Batch) -> list[Chosen]:
    """The blocks, or what is left of them after verification."""
    blocks = [draft.tokens for draft in batch.drafts]
    options = batch.rows[0].options  # all rows are of one kind
    if options.verify_threshold == 0 and options.logprobs is None:
        return [Chosen(tokens) for tokens in blocks]
    ids = torch.tensor(blocks)
    output = batch.model.verify(batch.cache, ids)
    first = batch.model.next_logits(batch.cache).unsqueeze(1)
    logits = torch.cat([first, batch.model.context_head(output.hidden[:, :-1])], dim=1)
    thresholds = torch.tensor([row.options.verify_threshold for row in batch.rows])
    counts = count_plausible(
        ids.to(logits.device), require_finite(logits), thresholds.to(logits.device)
    ).cpu()
    kept = [own[:count] for own, count in zip(blocks, counts.tolist(), strict=True)]
    chosen = with_logprobs(batch.rows, logits, kept)
    batch.cache.commit(output, counts)
    for slot, row in enumerate(batch.rows):
        row.context_forwards += 1
        if row.options.verify_threshold > 0:
            rejected = Verified(rejected=len(blocks[slot]) - len(kept[slot]))
            chosen[slot] = chosen[slot]._replace(verified=rejected)
    return chosen


def count_plausible(tokens: Tensor, logits: Tensor, least: Tensor) -> Tensor:
    """How many tokens of blocks (B, T) stand: the first, and all up to one whose probability under
    the logits (B, T, V) at its position is below least (B,). Returns (B,) >= 1.
    """
    chances = logits.softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    is_plausible = chances[:, 1:] >= least.unsqueeze(1)
    return is_plausible.long().cumprod(1).sum(1) + 1


BLOCKS = DecodingMode(choose=choose, draft=draft)
