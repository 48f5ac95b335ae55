"""The modes that fill blocks of mask tokens: diffusion, posterior, predict-and-noise.

The context tower may verify a block of mode="diffusion": it must read it anyway, and rejects
improbable tokens. Source: system.md section 4.
"""

import time
from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

from twotower.diffusion import Sampler, Step, require_finite
from twotower.engine.batch import Batch, Chosen, DecodingMode, Draft, padded
from twotower.engine.denoiser import Blocks, Denoiser, LocalDenoiser
from twotower.engine.denoiser_copy import CopyDenoiser
from twotower.engine.events import Event, StepTaken, Verified
from twotower.engine.logits import choose_tokens, with_logprobs
from twotower.model import TwoTower


class RowsAborted(Exception):
    """Nobody waits any more for a block that is being filled: of no row of the batch."""


def new_denoiser(model: TwoTower) -> Denoiser:
    """A denoiser for a new batch, where the tower is; a model may bring its own kind."""
    own: Callable[[], Denoiser] | None = getattr(model, "new_denoiser", None)
    if own is not None:
        return own()
    is_here = model.denoiser_device == model.context_device
    return LocalDenoiser(model) if is_here else CopyDenoiser(model)


def fill_blocks(
    batch: Batch,
    blocks: Tensor,
    sampler: Sampler,
    slots: Tensor | None = None,
    num_known: int = 0,
) -> Generator[Event, None, Step]:
    """Fill the masked positions of blocks (R, T), at least one a row; returns the last step.

    The first `num_known` tokens of a block are text already: events leave them out. RowsAborted
    after a pass when all rows of the batch are cancelled or too late.
    """
    rows = batch.rows if slots is None else [batch.rows[slot] for slot in slots.tolist()]
    # A pass that fails, and is tried again, has drawn nothing.
    known = [row.generator.get_state() for row in rows] if sampler.is_random else []
    generators = [torch.Generator().set_state(state) for state in known]
    before = [row.nfe for row in rows]
    last: Step | None = None
    batch.denoiser = batch.denoiser or new_denoiser(batch.model)
    asked = Blocks(blocks, sampler, generators, slots)
    for last in batch.denoiser.fill(batch.rows, batch.cache, asked):
        parts = last.t, last.nfe, last.tokens, last.is_masked, last.confidence
        each = zip(rows, before, *map(Tensor.tolist, parts), strict=True)
        for row, passes, t, nfe, tokens, is_masked, confidence in each:
            row.nfe = passes + nfe
            # A row that reuses its last pass has a step too; filters have not seen these tokens.
            if t > 0 and not row.text.is_filtered:
                yield StepTaken(
                    row=row.index,
                    block_index=row.num_commits,
                    step=last.index,
                    t=t,
                    tokens=tokens[num_known:],
                    is_masked=is_masked[num_known:],
                    confidence=confidence[num_known:],
                    nfe=row.nfe,
                )
        now = time.monotonic()
        if all(row.abort_reason(now) is not None for row in batch.rows):
            raise RowsAborted
    for row, generator in zip(rows, generators, strict=False):
        row.generator = generator
    assert last is not None
    return last


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
    ids, lengths = padded(blocks)
    output = batch.model.verify(batch.cache, ids, lengths)
    first = batch.model.next_logits(batch.cache).unsqueeze(1)
    logits = torch.cat([first, batch.model.context_head(output.hidden[:, :-1])], dim=1)
    thresholds = torch.tensor([row.options.verify_threshold for row in batch.rows])
    plausible = count_plausible(
        ids.to(logits.device), require_finite(logits), thresholds.to(logits.device)
    )
    counts = torch.minimum(plausible.cpu(), lengths)
    kept = [own[:count] for own, count in zip(blocks, counts.tolist(), strict=True)]
    chosen = with_logprobs(batch.rows, logits, kept)
    batch.commit(output, counts)
    for slot, row in enumerate(batch.rows):
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
