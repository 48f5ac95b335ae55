"""Self-speculation: the denoiser drafts a block, the context tower reads it and decides.

The output is that of mode="ar", token for token: a draft decides only how many tokens one reading
yields. Source: system.md section 4, 'Self-speculation'.
"""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from twotower.diffusion import Step, choose, denoise_block, gumbel
from twotower.engine.events import Event, StepTaken
from twotower.engine.logits import require_finite
from twotower.engine.options import sampling_params
from twotower.engine.pace import Pace
from twotower.engine.prefill import prefill
from twotower.engine.row import Row
from twotower.model import ContextCache, ContextView, TwoTower

# A draft is read as far as its predictions are all right with at least this probability, by the
# denoiser's own account.
LEAST_CHANCE = 0.05


def speculative_loop(model: TwoTower, rows: list[Row]) -> Iterator[Event]:
    """Draft, read, accept, until each row has ended; rows advance by different lengths."""
    cache = prefill(model, rows, [row.prompt for row in rows])
    state = [Speculation(row) for row in rows]
    choices = _choose(model.next_logits(cache).unsqueeze(1), state)
    accepted = torch.ones(len(rows), dtype=torch.int64)
    while True:
        kept = yield from _commit(state, choices, accepted)
        if not len(kept):
            return
        if len(kept) < len(state):
            cache = cache.select(kept)
            state = [state[i] for i in kept.tolist()]
            choices, accepted = choices[kept], accepted[kept]
        newest = choices.gather(1, accepted.unsqueeze(1) - 1)  # (B, 1), not yet in the cache
        drafts, lengths = yield from _draft(model, cache, state, newest)
        reading = model.read(cache, drafts)
        choices = _choose(model.context_head(reading.hidden), state)
        accepted = count_accepted(drafts, choices, lengths)
        cache.accept(reading, accepted)
        for one, length, count in zip(state, lengths.tolist(), accepted.tolist(), strict=True):
            one.record(length, count)


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


class Speculation:
    """One row's speculation: its pace, and the noise of tokens to come.

    Noise is drawn once per token in the order of the text, as AR decoding draws it, so that a
    sampled text is AR's too, whatever was drafted.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.pace = Pace()
        self._noise: list[Tensor] = []  # (V,) of each token to come, as far as it was needed

    @property
    def is_drafting(self) -> bool:
        """Whether the next cycle should have a draft for this row."""
        return self.pace.is_drafting and self.num_left > 1 and self.row.options.block_size > 1

    @property
    def num_left(self) -> int:
        """Tokens that the row may still write."""
        return self.row.options.max_new_tokens - len(self.row.tokens)

    def noise(self, length: int, vocab_size: int) -> Tensor:
        """Gumbel noise (length, V) of the next tokens; zeros, and nothing drawn, when greedy."""
        if self.row.options.temperature == 0:
            return torch.zeros(1, 1).expand(length, vocab_size)
        while len(self._noise) < length:
            self._noise.append(gumbel((vocab_size,), [self.row.generator])[0])
        return torch.stack(self._noise[:length])

    def record(self, length: int, accepted: int) -> None:
        """A reading of `length` tokens was made, and `accepted` of them stand."""
        self.row.context_forwards += 1
        if length > 1:
            self.pace.record_draft(accepted)
        else:
            self.pace.record_token()

    def use(self, count: int) -> None:
        """The next `count` tokens are written: their noise is spent."""
        del self._noise[:count]


def _draft(
    model: TwoTower, cache: ContextCache, state: list[Speculation], newest: Tensor
) -> Generator[Event, None, tuple[Tensor, Tensor]]:
    """What to read: newest (B, 1) with a draft behind it, (B, n); and how much of each row, (B,).

    Rows that do not draft read their newest token alone.
    """
    masked = (len(state), state[0].row.options.block_size - 1)
    blocks = torch.cat([newest, newest.new_full(masked, model.config.mask_token_id)], dim=1)
    lengths = torch.ones(len(state), dtype=torch.int64)
    drafting = torch.tensor([i for i, one in enumerate(state) if one.is_drafting])
    if len(drafting):
        rows = [state[i].row for i in drafting.tolist()]
        view = cache.view() if len(rows) == len(state) else cache.view().select(drafting)
        last = yield from _denoise(model, view, rows, blocks[drafting])
        # Not the first column: AR may have chosen the mask token, which the denoiser then fills.
        blocks[drafting, 1:] = last.tokens[:, 1:].cpu()
        left = torch.tensor([state[i].num_left for i in drafting.tolist()])
        lengths[drafting] = torch.minimum(draft_lengths(last.confidence.cpu()), left)
    return blocks[:, : int(lengths.max())], lengths


def _denoise(
    model: TwoTower, view: ContextView, rows: list[Row], blocks: Tensor
) -> Generator[Event, None, Step]:
    """The last of the `draft_passes` steps that fill blocks (B, T), always greedily."""
    view = view.to(model.denoiser_device)
    samplers = [row.options.draft_sampler(model.config.mask_token_id) for row in rows]
    before = [row.nfe for row in rows]
    last: Step | None = None

    def denoise(tokens: Tensor, t: Tensor, which: Tensor) -> Tensor:
        seen = view if len(which) == len(rows) else view.select(which)
        return require_finite(model.denoise(tokens, seen, t))

    for last in denoise_block(denoise, blocks.to(model.denoiser_device), samplers):
        for index in last.rows.tolist():
            rows[index].nfe = before[index] + int(last.nfe[index])
            yield _step_taken(rows[index], last, index)
    assert last is not None  # a block of two or more has a masked position
    return last


def _step_taken(row: Row, step: Step, index: int) -> StepTaken:
    """The draft alone: the first token of the block is text already."""
    return StepTaken(
        row=row.index,
        block_index=row.num_commits,
        step=step.index,
        t=float(step.t[index]),
        tokens=step.tokens[index, 1:].tolist(),
        is_masked=step.is_masked[index, 1:].tolist(),
        confidence=step.confidence[index, 1:].tolist(),
        nfe=row.nfe,
    )


def _choose(logits: Tensor, state: list[Speculation]) -> Tensor:
    """The AR tower's token at each position: logits (B, n, V) -> (B, n) on the CPU."""
    params = sampling_params([one.row.options for one in state])
    noise = None
    if any(one.row.options.temperature > 0 for one in state):
        noise = torch.stack([one.noise(*logits.shape[1:]) for one in state]).to(logits.device)
    return choose(require_finite(logits), params, noise).cpu()


def _commit(
    state: list[Speculation], choices: Tensor, accepted: Tensor
) -> Generator[Event, None, Tensor]:
    """Hand each row the choices that stand; returns the numbers of the rows that go on."""
    for one, tokens, count in zip(state, choices.tolist(), accepted.tolist(), strict=True):
        one.use(count)
        yield one.row.commit(tokens[:count])
        if one.row.is_finished:
            yield one.row.finished()
    going = [i for i, one in enumerate(state) if not one.row.is_finished]
    return torch.tensor(going, dtype=torch.int64)
