"""mode="speculative": the denoiser drafts a block, the context tower verifies it.

The text is that of mode="ar", token for token: a draft decides only how many tokens one
verification yields. Source: system.md section 4, 'Self-speculation'.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twotower.diffusion import choose as choose_each
from twotower.diffusion import gumbel
from twotower.engine import ar
from twotower.engine.batch import Batch, Choice, DecodingMode
from twotower.engine.denoiser import fill_blocks
from twotower.engine.events import Event
from twotower.engine.logits import choose_allowed, require_finite, rows_logprobs
from twotower.engine.request import Row

# A draft is verified as far as its predictions are all right with at least this probability, by the
# denoiser's own account.
LEAST_CHANCE = 0.05
FIRST_PAUSE, LONGEST_PAUSE = 24, 96  # AR tokens before the next trial; doubles while trials fail


class DraftController:
    """Whether a row drafts, by its own history alone, so that rows stay independent.

    break_even: AR steps that a draft and its verification cost; with fewer tokens a cycle AR
    decoding is faster. A text that drafts badly costs one trial at the start, then one in 24, 48
    and at last 96 tokens: at a break-even of 5, at least 0.9 of the speed of AR.
    """

    def __init__(self, break_even: float) -> None:
        self._break_even = break_even
        self._expected = 1.5 * break_even  # tokens of a cycle; one very bad draft leads to a pause
        self._pause = 0
        self._next_pause = FIRST_PAUSE

    @property
    def is_drafting(self) -> bool:
        """Whether the next cycle should have a draft."""
        return self._pause == 0

    def record_draft(self, accepted: int) -> None:
        """A cycle with a draft yielded `accepted` >= 1 tokens."""
        self._expected = (self._expected + accepted) / 2
        if self._expected >= self._break_even:
            self._next_pause = FIRST_PAUSE
            return
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)
        self._expected = self._break_even  # after the pause one good draft is enough to go on

    def record_token(self) -> None:
        """A cycle without a draft yielded its one token."""
        self._pause = max(0, self._pause - 1)


def draft(batch: Batch) -> Iterator[Event]:
    """What to verify: each row's newest token with a draft behind it, (B, n); how much of it, (B,);
    whether the denoiser wrote it, (B,).

    Rows that do not draft have their newest token alone, and what their grammar demands behind it.
    """
    rows, mask_token_id = batch.rows, batch.model.config.mask_token_id
    blocks = torch.full((len(rows), rows[0].options.block_size), mask_token_id)
    blocks[:, 0] = torch.tensor([row.tokens[-1] for row in rows])
    lengths = torch.tensor(
        [
            min(1 + _write_forced(row, block), row.num_left)
            for row, block in zip(rows, blocks, strict=True)
        ]
    )
    is_drafting = torch.tensor([_is_drafting(row, batch) for row in rows])
    places = is_drafting.nonzero().flatten()
    if len(places):
        # Greedy, because the context tower has the last word anyway.
        sampler = replace(batch.sampler, temperature=torch.zeros(len(rows))).select(places)
        last = yield from fill_blocks(batch, blocks[places], sampler, places, num_known=1)
        # Not the first column: AR may have chosen the mask token, which the denoiser then fills.
        blocks[places, 1:] = last.tokens[:, 1:].cpu()
        pairs = list(zip(places.tolist(), blocks[places].tolist(), strict=True))
        for place, tokens in pairs:  # all of them, before any answer is waited for
            _look_ahead(rows[place], tokens[1:])
        most = torch.tensor([_num_possible(rows[place], tokens) for place, tokens in pairs])
        lengths[places] = torch.minimum(draft_lengths(last.confidence.cpu()), most)
    batch.draft = blocks[:, : int(lengths.max())], lengths, is_drafting


def _is_drafting(row: Row, batch: Batch) -> bool:
    """Whether this cycle has a draft for the row."""
    if row.controller is None:
        row.controller = DraftController(batch.model.draft_cost)
    return row.controller.is_drafting and row.num_left > 1 and row.options.block_size > 1


def _write_forced(row: Row, block: Tensor) -> int:
    """Put what the row's grammar demands next into its block (T,), behind the newest token; the
    denoiser keeps something to fill. Returns how many tokens; like any draft only a proposal.
    """
    if row.grammar is None:
        return 0
    row.grammar.follow(row.tokens)
    forced = row.grammar.forced()[: max(0, len(block) - 2)]
    _look_ahead(row, forced)
    block[1 : 1 + len(forced)] = torch.tensor(forced)
    return len(forced)


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


def draft_lengths(confidence: Tensor) -> Tensor:
    """How much of each draft to verify: confidence (B, n) -> (B,), at least 2, at most n."""
    return (confidence.cumprod(1) >= LEAST_CHANCE).sum(1).clamp(min=2)


def choose(batch: Batch) -> Choice:
    """Verify the drafts: keep what the AR tower chooses too, and its own token behind that."""
    drafts, lengths, is_drafting = batch.draft
    output = batch.model.verify(batch.cache, drafts, lengths)
    logits = batch.model.context_head(output.hidden)
    choices = _choices(batch, logits)
    accepted = count_accepted(drafts, choices, lengths)
    counts = accepted.tolist()
    tokens = [own[:count] for own, count in zip(choices.tolist(), counts, strict=True)]
    logprobs = rows_logprobs(batch.rows, logits, tokens)
    batch.cache.commit(output, accepted)
    counted = []
    each = zip(batch.rows, lengths.tolist(), counts, is_drafting.tolist(), strict=True)
    for row, length, count, has_draft in each:
        row.context_forwards += 1
        assert row.controller is not None
        if has_draft:
            row.controller.record_draft(count)
        else:
            row.controller.record_token()
        counted.append({"drafted": length - 1, "accepted": count - 1})
    return Choice(tokens, logprobs, counted)


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

    Under a grammar, choices count as far as the draft agrees with them.
    """
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
    row, (drafts, lengths, _) = batch.rows[place], batch.draft
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
