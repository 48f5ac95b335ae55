"""mode="speculative": a draft is written at little cost, and the context tower verifies it.

The text is that of mode="ar", token for token: a draft decides only how many tokens one
verification yields. Source: system.md section 4, 'Self-speculation'.
"""

from collections.abc import Generator, Iterator, Sequence

import torch

from twotower.engine import drafts_denoiser, proposals
from twotower.engine.ar import start
from twotower.engine.batch import Batch, Chosen, DecodingMode, Draft
from twotower.engine.drafts import Proposal
from twotower.engine.events import Event, Verified
from twotower.engine.row import Row
from twotower.engine.verify import verify


def draft(batch: Batch) -> Iterator[Event]:
    """What to verify of each row: its newest token with a draft behind it, if it drafts, and what
    its grammar demands in between.
    """
    rows, size = batch.rows, batch.rows[0].options.block_size
    known = [[row.tokens[-1], *_forced(row, size)] for row in rows]
    proposed = yield from _propose(batch, known)
    blocks: list[list[int]] = []
    parents: list[list[int]] = []
    for row, own, proposal in zip(rows, known, proposed, strict=True):
        row.proposal = proposal if proposal.tokens or proposal.drafter == "denoiser" else None
        blocks.append([*own, *proposal.tokens][: row.num_left])
        parents.append([*range(-1, len(own) - 1), *proposal.parents])
    for row, block in zip(rows, blocks, strict=True):  # before any answer is waited for
        if row.grammar is not None and row.proposal is not None:
            row.grammar.look_ahead(block[1:])
    batch.drafts = [
        Draft(block[: (length := _num_possible(row, block))], follow[:length])
        for row, block, follow in zip(rows, blocks, parents, strict=True)
    ]


def _propose(
    batch: Batch, known: Sequence[list[int]]
) -> Generator[Event, None, Sequence[Proposal]]:
    """What to verify behind what is known of each row, by the denoiser where that pays."""
    proposed = proposals.propose(batch, batch.rows, known)
    writers = drafts_denoiser.choose_writers(batch, known, proposed)
    if not writers:
        return proposed
    rows, size = [batch.rows[index] for index in writers], batch.rows[0].options.block_size
    masks, given = [batch.model.config.mask_token_id] * size, [known[i] for i in writers]
    blocks = torch.tensor([[*own, *masks[len(own) :]] for own in given])
    written = yield from drafts_denoiser.write(batch, blocks, torch.tensor(writers))
    for index, row, own in zip(writers, rows, given, strict=True):
        assert row.controller is not None
        row.controller.begin([*own[1:], *proposed[index].tokens], proposed[index].sure)
    drafted = [block[len(own) :] for own, block in zip(given, written, strict=True)]
    others = [own for index, own in enumerate(proposed) if index not in writers]
    cost = drafts_denoiser.writing_cost(batch, len(writers))
    found = proposals.propose(batch, rows, given, drafted, others, cost)
    for index, proposal in zip(writers, found, strict=True):
        proposed[index] = proposal
    return proposed


def _forced(row: Row, size: int) -> list[int]:
    """What the row's grammar demands behind its newest token; a drafter keeps something to fill.
    Like any draft only a proposal, on which the grammar works while the towers do.
    """
    if row.grammar is None:
        return []
    row.grammar.follow(row.tokens)
    forced = row.grammar.forced()[: max(0, size - 2)]
    row.grammar.look_ahead(forced)
    return forced


def _num_possible(row: Row, block: list[int]) -> int:
    """How much of a block could be accepted, and the token that could not: no more is verified.
    What ends a text is AR's own choice behind the draft, so nothing of it is verified either.
    """
    ends = row.options.eos_token_id
    possible = next((at for at, token in enumerate(block) if token in ends), len(block))
    if row.grammar is not None:
        possible = min(possible, 2 + row.grammar.num_allowed(block[1:]))
    return min(row.num_left, possible)


def choose(batch: Batch) -> list[Chosen]:
    """Verify the drafts, and let each row's controller learn from it."""
    found, chosen = verify(batch), []
    for row, draft, own in zip(batch.rows, batch.drafts, found, strict=True):
        length, num_tokens = len(draft.tokens), len(own.tokens)
        drafter = row.proposal and row.proposal.drafter
        if row.controller is not None and drafter == "denoiser":
            row.controller.record_draft(own.tokens)
        elif row.controller is not None:
            row.controller.record_other()
        verified = Verified(length - 1, num_tokens - 1, drafter)
        chosen.append(own._replace(verified=verified))
    return chosen


SPECULATIVE = DecodingMode(choose=choose, draft=draft, start=start, num_unread=1)
