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
    able: list[tuple[bool, float, int]] = []
    for index, (row, own) in enumerate(zip(batch.rows, known, strict=True)):
        if row.options.drafts == "lookup" or not batch.model.has_denoiser:
            continue
        if len(own) < row.options.block_size and row.num_left >= 2:  # a position is left to fill
            row.controller = row.controller or _controller(row, batch)
            added = row.controller.expected(instead[index]) - instead[index].expected
            able.append((not row.controller.must_try, -added, index))
    costs, lengths = drafting_of(batch).costs, [own.length for own in instead]
    expected, num_writers = sum(own.expected for own in instead), 0
    gain = expected / costs.of_pass(lengths)
    for number, (is_choice, less, index) in enumerate(sorted(able), 1):
        options, num_others = batch.rows[index].options, len(instead[index].tokens)
        most = max(1 + MAX_DRAFT, options.block_size), batch.rows[index].num_left
        lengths[index] = min(options.block_size + num_others, *most)
        expected -= less
        found = expected / (writing_cost(batch, number) + costs.of_pass(lengths))
        if found > gain or not is_choice:
            num_writers, gain = number, found
    return sorted(index for *_, index in sorted(able)[:num_writers])


def _controller(row: Row, batch: Batch) -> DraftController:
    told = batch.model.tokens_per_cycle
    if told is None or row.options.drafts == "denoiser":  # only trials tell, or only they are asked
        return DraftController(row.options.block_size / 2, _GUESSED, must_try=True)
    return DraftController(_ADDED * (told - 1), _KNOWN)


def writing_cost(batch: Batch, num_writers: int) -> float:
    """AR steps of one row that drafts take, if as many rows write: all wait for them. Where that
    was not measured, a layer of either tower costs as much.
    """
    config, costs = batch.model.config, drafting_of(batch).costs
    size = batch.rows[0].options.block_size
    num_passes = max(row.options.draft_passes for row in batch.rows)
    share = costs.passes.denoiser or config.denoiser.num_layers / config.context.num_layers
    passes = num_passes * share * (costs.of_pass([size] * num_writers) - costs.beside)
    together, each = _TOGETHER, _EACH
    if (step_s := costs.passes.step_s) is not None:
        together, each = (s * (1 - costs.beside) / step_s for s in (_TOGETHER_S, _EACH_S))
    return passes + together + each * num_writers


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
