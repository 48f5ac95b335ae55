"""mode="speculative": a draft is written at little cost, and the context tower verifies it.

The text is that of mode="ar", token for token: a draft decides only how many tokens one
verification yields. Source: system.md section 4, 'Self-speculation'.
"""

from collections.abc import Iterator

import torch

from twotower.engine import drafts_denoiser, drafts_lookup
from twotower.engine.batch import Batch, Choice, DecodingMode
from twotower.engine.drafts import best
from twotower.engine.events import Event, Verified
from twotower.engine.request import Row
from twotower.engine.verify import start, verify

PROPOSE = (drafts_denoiser.propose, drafts_lookup.propose)


def draft(batch: Batch) -> Iterator[Event]:
    """What to verify: each row's newest token with a draft behind it, (B, n); how much of it, (B,).

    Rows that do not draft have their newest token alone, and what their grammar demands behind it.
    """
    rows, size = batch.rows, batch.rows[0].options.block_size
    width = max(size, 1 + drafts_lookup.MOST_DRAFT)
    blocks = torch.full((len(rows), width), batch.model.config.mask_token_id)
    lengths = torch.empty(len(rows), dtype=torch.int64)
    for place, row in enumerate(rows):
        known = [row.tokens[-1], *_forced(row, size)]
        row.proposal = best(propose(row, batch, known[1:]) for propose in PROPOSE)
        known += row.proposal.tokens if row.proposal is not None else ()
        blocks[place, : len(known)] = torch.tensor(known)
        lengths[place] = min(len(known), row.num_left)
    drafted = [(row, i) for i, row in enumerate(rows) if row.proposal is not None]
    if unwritten := [i for row, i in drafted if row.proposal and not row.proposal.tokens]:
        places = torch.tensor(unwritten)
        lengths[places] = yield from drafts_denoiser.write(batch, blocks[:, :size], places)
    ends = [(row, place, blocks[place, : lengths[place]].tolist()) for row, place in drafted]
    for row, _, block in ends:  # all of them, before any answer is waited for
        _look_ahead(row, block[1:])
    for row, place, block in ends:
        lengths[place] = _num_possible(row, block)
    most = int(lengths.max())
    is_padding = torch.arange(most) >= lengths.unsqueeze(1)
    # Any token: a mask of the denoiser's own is none that the context tower could read.
    batch.draft = blocks[:, :most].masked_fill(is_padding, 0), lengths


def _forced(row: Row, size: int) -> list[int]:
    """What the row's grammar demands behind its newest token; a drafter keeps something to fill.
    Like any draft only a proposal.
    """
    if row.grammar is None:
        return []
    row.grammar.follow(row.tokens)
    forced = row.grammar.forced()[: max(0, size - 2)]
    _look_ahead(row, forced)
    return forced


def _look_ahead(row: Row, tokens: list[int]) -> None:
    """Let the row's grammar work on what may come, while the towers do."""
    if row.grammar is not None:
        row.grammar.look_ahead(tokens)


def _num_possible(row: Row, block: list[int]) -> int:
    """How much of a block could be accepted, and the token that could not: no more is verified."""
    possible = len(block)
    if row.grammar is not None:
        possible = min(possible, 2 + row.grammar.num_allowed(block[1:]))
    return min(row.num_left, possible)


def choose(batch: Batch) -> Choice:
    """Verify the drafts, and let each row's controller learn from it."""
    _, lengths = batch.draft
    choice, verified = verify(batch), []
    for row, length, own in zip(batch.rows, lengths.tolist(), choice.tokens, strict=True):
        drafter = None if row.proposal is None else row.proposal.drafter
        if row.controller is not None and row.proposal is not None and drafter == "denoiser":
            spent = row.proposal.cost + batch.pass_cost(length)
            row.controller.record_draft(len(own) / spent)
        elif row.controller is not None:
            row.controller.record_other()
        verified.append(Verified(length - 1, len(own) - 1, drafter))
    return choice._replace(verified=verified)


SPECULATIVE = DecodingMode(choose=choose, draft=draft, start=start, num_unread=1)
