"""mode="speculative": a draft is written at little cost, and the context tower verifies it.

The text is that of mode="ar", token for token: a draft decides only how many tokens one
verification yields. Source: system.md section 4, 'Self-speculation'.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from twotower.diffusion import choose as choose_each
from twotower.diffusion import gumbel
from twotower.engine import ar, drafts_denoiser, drafts_lookup
from twotower.engine.batch import Batch, Choice, DecodingMode
from twotower.engine.constraints import choose_allowed, penalize
from twotower.engine.drafts import Proposal, best, pass_cost
from twotower.engine.events import Event, Verified
from twotower.engine.logits import require_finite, rows_logprobs
from twotower.engine.request import Row

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
    """Verify the drafts: keep what the AR tower chooses too, and its own token behind that."""
    drafts, lengths = batch.draft
    output = batch.model.verify(batch.cache, drafts, lengths)
    logits = batch.model.context_head(output.hidden)
    choices = _choices(batch, logits)
    accepted = count_accepted(drafts, choices, lengths)
    counts = accepted.tolist()
    tokens = [own[:count] for own, count in zip(choices.tolist(), counts, strict=True)]
    logprobs = rows_logprobs(batch.rows, logits, tokens)
    batch.cache.commit(output, accepted)
    verified = []
    for row, length, count in zip(batch.rows, lengths.tolist(), counts, strict=True):
        row.context_forwards += 1
        _record(row, count, pass_cost(batch.model.pass_costs, length))
        drafter = None if row.proposal is None else row.proposal.drafter
        verified.append(Verified(length - 1, count - 1, drafter))
    return Choice(tokens, logprobs, verified)


def _record(row: Row, num_tokens: int, verifying: float) -> None:
    """Let the row's controllers learn from a cycle's tokens; verifying: AR steps that this took."""
    for controller in row.controllers.values():
        if row.proposal is not None and controller is row.proposal.controller:
            controller.record_draft(num_tokens / (row.proposal.cost + verifying))
        else:
            controller.record_other()


def count_accepted(drafts: Tensor, choices: Tensor, lengths: Tensor) -> Tensor:
    """How many tokens of drafts (B, n) stand: the first, and each that the choice before it equals.

    choices (B, n): the AR tower's token after each; lengths (B,) >= 1: how much of a row's draft
    counts. Returns (B,) >= 1.
    """
    is_right = drafts[:, 1:] == choices[:, :-1]
    right = is_right.long().cumprod(1).sum(1) + 1
    return torch.minimum(right, lengths)


def _choices(batch: Batch, logits: Tensor) -> Tensor:
    """The AR tower's token after each of the draft's: logits (B, n, V) -> (B, n) on the CPU.

    Penalties count the draft's tokens, and under a grammar choices are made, as far as the draft
    agrees with them.
    """
    drafts, lengths = batch.draft
    each = zip(drafts.tolist(), lengths.tolist(), strict=True)
    logits = penalize(logits, batch.rows, [own[1:length] for own, length in each])
    noise = None
    if not batch.sampler.is_greedy:
        noise = torch.stack([_noise(row, *logits.shape[1:]) for row in batch.rows])
        noise = noise.to(logits.device)
    choices = choose_each(require_finite(logits), batch.sampler, noise).cpu()
    for place, row in enumerate(batch.rows):
        if row.grammar is not None:
            own = None if noise is None else noise[place]
            kept = _keep_grammar(batch, place, logits[place], own)
            choices[place, : len(kept)] = torch.tensor(kept)
    return choices


def _keep_grammar(batch: Batch, place: int, logits: Tensor, noise: Tensor | None) -> Sequence[int]:
    """A row's choices from left to right, each under the grammar after those before it, up to the
    first that its draft does not have: logits (n, V).
    """
    row, (drafts, lengths) = batch.rows[place], batch.draft
    assert row.grammar is not None
    kept: list[int] = []
    following = [*drafts[place].tolist()[1:], None]
    for at in range(int(lengths[place])):
        row.grammar.follow(row.tokens + kept)
        noises = None if noise is None else noise[at]
        kept.append(choose_allowed(row, logits[at], batch.sampler, place, noises))
        if kept[-1] != following[at] or kept[-1] in row.options.eos_token_id:
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


SPECULATIVE = DecodingMode(choose=choose, draft=draft, start=ar.choose, num_unread=1)
