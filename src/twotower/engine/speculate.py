"""Self-speculation: the denoiser drafts a block, the context tower reads it and decides.

The output is that of mode="ar", token for token: a draft decides only how many tokens one reading
yields. Source: system.md section 4, 'Self-speculation'.
"""

from collections.abc import Generator

import torch
from torch import Tensor

from twotower.diffusion import choose, gumbel
from twotower.engine.batch import Batch, Cycle, Proposal, commit, last_tokens
from twotower.engine.events import Event
from twotower.engine.fill import fill_blocks
from twotower.engine.logits import choose_allowed, require_finite, rows_logprobs
from twotower.engine.options import sampling_params
from twotower.engine.row import Row
from twotower.model import TwoTower

# A draft is read as far as its predictions are all right with at least this probability, by the
# denoiser's own account.
LEAST_CHANCE = 0.05


def _start(model: TwoTower, batch: Batch) -> Generator[Event, None, Batch]:
    """The AR tower's first token is the rows' first."""
    logits = model.next_logits(batch.cache).unsqueeze(1)
    alone = last_tokens(batch.rows), torch.ones(len(batch.rows), dtype=torch.int64)
    choices = _choose(logits, batch.rows, alone)
    return (yield from _commit(batch, choices, alone[1], logits))


def _settle(model: TwoTower, batch: Batch, proposal: Proposal) -> Generator[Event, None, Batch]:
    """Read the drafts and keep what the AR tower chooses too, and its own token behind that."""
    drafts, lengths, is_drafting = proposal
    output = model.verify(batch.cache, drafts, lengths)
    logits = model.context_head(output.hidden)
    choices = _choose(logits, batch.rows, (drafts, lengths))
    accepted = count_accepted(drafts, choices, lengths)
    batch.cache.commit(output, accepted)
    counts = lengths.tolist(), accepted.tolist(), is_drafting.tolist()
    for row, length, count, has_draft in zip(batch.rows, *counts, strict=True):
        row.context_forwards += 1
        row.drafted, row.accepted = length - 1, count - 1
        if has_draft:
            row.pace.record_draft(count)
        else:
            row.pace.record_token()
    return (yield from _commit(batch, choices, accepted, logits))


def count_accepted(drafts: Tensor, choices: Tensor, lengths: Tensor) -> Tensor:
    """How many tokens of drafts (B, n) stand: the first, and each that the choice before it equals.

    choices (B, n): the AR tower's token after each; lengths (B,) >= 1: how much of a row's draft
    counts. Returns (B,) >= 1.
    """
    is_right = drafts[:, 1:] == choices[:, :-1]
    right = is_right.long().cumprod(1).sum(1) + 1
    return torch.minimum(right, lengths)


def draft_lengths(confidence: Tensor) -> Tensor:
    """How much of each draft is worth reading: confidence (B, n) -> (B,), at least 2, at most n."""
    return (confidence.cumprod(1) >= LEAST_CHANCE).sum(1).clamp(min=2)


def _num_left(row: Row) -> int:
    """Tokens that the row may still write."""
    return row.options.max_new_tokens - len(row.tokens)


def _is_drafting(row: Row) -> bool:
    """Whether the next cycle should have a draft for the row."""
    return row.pace.is_drafting and _num_left(row) > 1 and row.options.block_size > 1


def _propose(model: TwoTower, batch: Batch) -> Generator[Event, None, Proposal]:
    """What to read: each row's newest token with a draft behind it, (B, n); how much of it, (B,);
    whether the denoiser wrote it, (B,).

    Rows that do not draft read their newest token alone, and what their grammar demands behind it.
    """
    rows = batch.rows
    newest = last_tokens(rows)
    masked = (len(rows), rows[0].options.block_size - 1)
    blocks = torch.cat([newest, newest.new_full(masked, model.config.mask_token_id)], dim=1)
    forced = [_write_forced(row, block) for row, block in zip(rows, blocks, strict=True)]
    lengths = torch.tensor(
        [min(1 + count, _num_left(row)) for row, count in zip(rows, forced, strict=True)]
    )
    is_drafting = torch.tensor([_is_drafting(row) for row in rows])
    drafting = is_drafting.nonzero().flatten()
    if len(drafting):
        own = [rows[i] for i in drafting.tolist()]
        batch.seat.follow(batch.cache)
        samplers = [row.options.draft_sampler(model.config.mask_token_id) for row in own]
        last = yield from fill_blocks(
            batch.seat, own, blocks[drafting], samplers, places=drafting, num_known=1
        )
        # Not the first column: AR may have chosen the mask token, which the denoiser then fills.
        blocks[drafting, 1:] = last.tokens[:, 1:].cpu()
        pairs = zip(own, blocks[drafting].tolist(), strict=True)
        most = torch.tensor(
            [min(_num_left(row), _num_possible(row, draft)) for row, draft in pairs]
        )
        lengths[drafting] = torch.minimum(draft_lengths(last.confidence.cpu()), most)
    return blocks[:, : int(lengths.max())], lengths, is_drafting


def _write_forced(row: Row, block: Tensor) -> int:
    """Put what the row's grammar demands next into its block (T,), behind the newest token; the
    denoiser keeps something to fill. Returns how many tokens; like any draft only a proposal.
    """
    if row.grammar is None:
        return 0
    row.grammar.follow(row.tokens)
    forced = row.grammar.forced()[: max(0, len(block) - 2)]
    block[1 : 1 + len(forced)] = torch.tensor(forced)
    return len(forced)


def _num_possible(row: Row, draft: list[int]) -> int:
    """How much of a draft could be accepted, and the token that could not: no more is read."""
    if row.grammar is None:
        return len(draft)
    return min(len(draft), 2 + row.grammar.num_allowed(draft[1:]))


def _choose(logits: Tensor, rows: list[Row], proposal: Proposal) -> Tensor:
    """The AR tower's token after each of the drafts': logits (B, n, V) -> (B, n) on the CPU.

    Under a grammar, choices count as far as the draft agrees with them.
    """
    params = sampling_params([row.options for row in rows])
    noise = None
    if any(row.options.temperature > 0 for row in rows):
        noise = torch.stack([_noise(row, *logits.shape[1:]) for row in rows]).to(logits.device)
    choices = choose(require_finite(logits), params, noise).cpu()
    for place, (row, draft, length) in enumerate(zip(rows, *proposal, strict=True)):
        if row.grammar is not None:
            own = None if noise is None else noise[place]
            kept = _keep_grammar(row, logits[place, : int(length)], draft, own)
            choices[place, : len(kept)] = torch.tensor(kept)
    return choices


def _keep_grammar(row: Row, logits: Tensor, draft: Tensor, noise: Tensor | None) -> list[int]:
    """The row's choices from left to right, each under the grammar after those before it, up to
    the first that the draft does not have: logits (n, V), draft (>= n).
    """
    assert row.grammar is not None
    kept: list[int] = []
    following = [*draft.tolist()[1:], None]
    for place, own in enumerate(logits):
        row.grammar.follow(row.tokens + kept)
        noises = None if noise is None else noise[place]
        kept.append(choose_allowed(row, own, noises))
        if kept[-1] != following[place] or kept[-1] in row.eos:
            break
    return kept


def _noise(row: Row, length: int, vocab_size: int) -> Tensor:
    """Gumbel noise (length, V) of the next tokens; zeros, and nothing drawn, when greedy.

    Drawn once per token in the order of the text, as AR decoding draws it, so that a sampled text
    is AR's too, whatever was drafted.
    """
    if row.options.temperature == 0:
        return torch.zeros(1, 1).expand(length, vocab_size)
    while len(row.noise_ahead) < length:
        row.noise_ahead.append(gumbel((vocab_size,), [row.generator])[0])
    return torch.stack(row.noise_ahead[:length])


def _commit(
    batch: Batch, choices: Tensor, accepted: Tensor, logits: Tensor
) -> Generator[Event, None, Batch]:
    """Hand each row the choices that stand, made from logits (B, n, V); returns the rows that go
    on.
    """
    counts = accepted.tolist()
    for row, count in zip(batch.rows, counts, strict=True):
        del row.noise_ahead[:count]  # spent
    tokens = [own[:count] for own, count in zip(choices.tolist(), counts, strict=True)]
    batch, _ = yield from commit(batch, tokens, rows_logprobs(batch.rows, logits, tokens))
    return batch


SPECULATIVE_CYCLE = Cycle(start=_start, propose=_propose, settle=_settle)
