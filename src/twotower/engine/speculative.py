"""mode="speculative": a draft is written at little cost, and the context tower verifies it.

The text is that of mode="ar", token for token: a draft decides only how many tokens one
verification yields. Source: system.md section 4, 'Self-speculation'.
"""

from collections.abc import Iterator, Sequence

import torch

from twotower.engine import drafts_denoiser, drafts_lookup
from twotower.engine.batch import Batch, Choice, DecodingMode
from twotower.engine.drafts import Proposal, best, pass_cost
from twotower.engine.events import Event, Verified
from twotower.engine.request import Row
from twotower.engine.verify import start, verify

# The denoiser first: a lookup that gives two tokens would keep one that gives ten from being tried.
PROPOSE = (drafts_denoiser.propose, drafts_lookup.propose)


def draft(batch: Batch) -> Iterator[Event]:
    """What to verify: each row's newest token with a draft behind it, (B, n); how much of it, (B,).

    Rows that do not draft have their newest token alone, and what their grammar demands behind it.
    """
    rows, size = batch.rows, batch.rows[0].options.block_size
    blocks = torch.full((len(rows), size), batch.model.config.mask_token_id)
    lengths = torch.empty(len(rows), dtype=torch.int64)
    for place, row in enumerate(rows):
        known = [row.tokens[-1], *_forced(row, size)]
        row.proposal = _proposal(row, batch, known)
        known += row.proposal.tokens if row.proposal is not None else ()
        blocks[place, : len(known)] = torch.tensor(known)
        lengths[place] = min(len(known), row.num_left)
    drafted = [(row, i) for i, row in enumerate(rows) if row.proposal is not None]
    if unwritten := [i for row, i in drafted if row.proposal and not row.proposal.tokens]:
        places = torch.tensor(unwritten)
        lengths[places] = yield from drafts_denoiser.write(batch, blocks, places)
    for row, place in drafted:  # all of them, before any answer is waited for
        _look_ahead(row, blocks[place, 1:].tolist())
    for row, place in drafted:
        lengths[place] = min(int(lengths[place]), _num_possible(row, blocks[place].tolist()))
    most = int(lengths.max())
    is_padding = torch.arange(most) >= lengths.unsqueeze(1)
    # Any token: a mask of the denoiser's own is none that the context tower could read.
    batch.draft = blocks[:, :most].masked_fill(is_padding, 0), lengths


def _proposal(row: Row, batch: Batch, known: Sequence[int]) -> Proposal | None:
    """The draft that the row has in this cycle behind its newest token and the other known ones."""
    room = min(row.options.block_size, row.num_left) - len(known)
    if room < 1:
        return None
    return best(propose(row, batch, known[1:], room) for propose in PROPOSE)


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
    """Verify the drafts, and let each row's controllers learn from it."""
    _, lengths = batch.draft
    choice, verified = verify(batch), []
    for row, length, own in zip(batch.rows, lengths.tolist(), choice.tokens, strict=True):
        _record(row, len(own), pass_cost(batch.model.pass_costs, length))
        drafter = None if row.proposal is None else row.proposal.drafter
        verified.append(Verified(length - 1, len(own) - 1, drafter))
    return choice._replace(verified=verified)


def _record(row: Row, num_tokens: int, verifying: float) -> None:
    """Let the row's controllers learn from a cycle's tokens; verifying: AR steps that this took."""
    for controller in row.controllers.values():
        if row.proposal is not None and controller is row.proposal.controller:
            controller.record_draft(num_tokens / (row.proposal.cost + verifying))
        else:
            controller.record_other()


SPECULATIVE = DecodingMode(choose=choose, draft=draft, start=start, num_unread=1)
