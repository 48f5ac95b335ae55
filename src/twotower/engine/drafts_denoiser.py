"""Drafts of the denoiser tower: all masked positions of a block at once."""

from collections.abc import Generator, Sequence

from torch import Tensor

from twotower.engine.batch import Batch
from twotower.engine.blocks import fill_blocks
from twotower.engine.drafts import DraftController, Proposal
from twotower.engine.drafts_lookup import Candidates
from twotower.engine.events import Event
from twotower.engine.proposals import MAX_DRAFT, drafting_of
from twotower.engine.row import Row

# Of the tokens that drafts add to AR's one on held-out answers, what they add where lookups fail:
# texts are harder there, and some of the rest lookups know.
_ADDED = 0.75
_KNOWN, _GUESSED = 4.0, 0.5  # drafts of a row that count as much as that, and as a guess
# Seconds that drafts take beside their passes: those of a batch together, and each. In AR steps,
# where no second was measured.
_TOGETHER_S = _EACH_S = 0.0005
_TOGETHER = _EACH = 0.1


def choose_writers(
    batch: Batch, known: Sequence[Sequence[int]], instead: Sequence[Proposal]
) -> list[int]:
    """The rows, by index, for which the denoiser is to write. known: each row's newest token and
    what must follow; instead: what each would verify without a draft of the denoiser.
    """
    writers: list[int] = []
    for index, (row, own) in enumerate(zip(batch.rows, known, strict=True)):
        if row.options.drafts == "lookup" or not batch.model.has_denoiser:
            continue
        if len(own) < row.options.block_size and row.num_left >= 2:  # a position is left to fill
            row.controller = row.controller or _controller(row, batch)
            writers.append(index)
    num_writers = 0
    while len(writers) != num_writers:  # the fewer write, the more each pays for all
        num_writers = len(writers)
        writers = [i for i in writers if pays(batch.rows[i], batch, instead[i], num_writers)]
    return writers


def _controller(row: Row, batch: Batch) -> DraftController:
    told = batch.model.tokens_per_cycle
    if told is None or row.options.drafts == "denoiser":  # only trials tell, or only they are asked
        return DraftController(row.options.block_size / 2, _GUESSED, is_guess=True)
    return DraftController(_ADDED * (told - 1), _KNOWN)


def pays(row: Row, batch: Batch, instead: Proposal, num_writers: int) -> bool:
    """Whether a draft is expected to gain more than `instead`, if num_writers rows write."""
    assert row.controller is not None
    size = row.options.block_size
    length = min(size + len(instead.tokens), max(1 + MAX_DRAFT, size), row.num_left)
    cost = writing_cost(row, batch, num_writers) + drafting_of(batch).costs.of_pass(length)
    return row.controller.expected(instead) > instead.gain * cost


def writing_cost(row: Row, batch: Batch, num_writers: int) -> float:
    """AR steps that a draft takes, if as many rows write: the others wait for them, at the writers'
    expense. Where that was not measured, a layer of either tower costs as much.
    """
    config, options, costs = batch.model.config, row.options, drafting_of(batch).costs
    share = costs.passes.denoiser or config.denoiser.num_layers / config.context.num_layers
    passes = share * (costs.of_pass(options.block_size, num_writers) - costs.beside)
    together, each = _TOGETHER, _EACH
    if (step_s := costs.passes.step_s) is not None:
        together, each = (s * (1 - costs.beside) / step_s for s in (_TOGETHER_S, _EACH_S))
    shared = options.draft_passes * passes + together * costs.of_pass(1, num_rows=1)
    return each + shared * len(batch.rows) / num_writers


def write(
    batch: Batch, blocks: Tensor, indices: Tensor
) -> Generator[Event, None, list[list[Candidates]]]:
    """Fill the masks of blocks (R, T) of the rows `indices` (R,): each one's tokens and how sure
    the denoiser is of them, given those before; 1 for what was known. Behind a token stand the next
    most probable ones, where drafts may branch.
    """
    sampler = drafting_of(batch).sampler
    if len(indices) < len(batch.rows):
        sampler = sampler.select(indices)
    last = yield from fill_blocks(batch, blocks, sampler, indices, num_known=1)
    written: list[list[Candidates]] = [
        [[own] for own in zip(tokens, sure, strict=True)]
        for tokens, sure in zip(last.tokens.tolist(), last.confidence.tolist(), strict=True)
    ]
    if last.others is not None:
        for row, *others in zip(last.rows.tolist(), *map(Tensor.tolist, last.others), strict=True):
            each = zip(written[row], *others, strict=True)
            # What was no mask any more in the last pass has others of probability 0.
            written[row] = [
                [*own, *(other for other in zip(*more, strict=True) if other[1] > 0)]
                for own, *more in each
            ]
    return written
