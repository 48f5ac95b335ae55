"""What is proposed to the rows of a batch: as much of what probably follows their texts as is worth
verifying.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import merge
from itertools import chain, count, repeat
from operator import itemgetter

import torch

from twotower.engine.batch import Batch
from twotower.engine.drafts import BatchCosts, Drafting, Proposal
from twotower.engine.drafts_lookup import Candidates, Guess, Lookup
from twotower.engine.row import Row
from twotower.model.draft_tree import MAX_TOKENS

MAX_DRAFT = 15  # tokens, where the denoiser wrote no more: with the newest one 16
NUM_OTHERS = 2  # next most probable tokens at each position of a draft that may branch


def drafting_of(batch: Batch) -> Drafting:
    """What decides about the batch's drafts, worked out once while its rows stay the same."""
    if batch.drafting is None:
        model, num_rows = batch.model, len(batch.rows)
        costs = BatchCosts(model.pass_costs, has_idle_lanes=model.context_device.type != "cpu")
        # Of a block larger than a tree only a chain may be verified.
        is_small = batch.rows[0].options.block_size <= MAX_TOKENS
        may_branch = model.verifies_trees and is_small and not batch.needs_host
        others, zeros = NUM_OTHERS if may_branch else 0, torch.zeros(num_rows)
        sampler = replace(batch.sampler, temperature=zeros, num_others=others)
        batch.drafting = Drafting(costs, sampler, may_branch)
    return batch.drafting


def propose(
    batch: Batch,
    rows: Sequence[Row],
    known: Sequence[Sequence[int]],
    drafted: Sequence[Sequence[Candidates]] = (),
    others: Sequence[Proposal] = (),
    writing: float = 0.0,
) -> list[Proposal]:
    """What to verify of each of some rows of a batch behind what is known: its newest token and
    what must follow that.

    drafted: by the denoiser for each, whose passes took `writing` AR steps. others: what is
    verified of the batch's other rows.
    """
    each = zip(rows, known, drafted or repeat(()), strict=False)
    guesses = [_guesses(row, batch, own[1:], candidates) for row, own, candidates in each]
    firsts = [next(own, None) for own in guesses]
    all_guesses = [
        own if first is None else chain((first,), own)
        for first, own in zip(firsts, guesses, strict=True)
    ]
    lengths = [*map(len, known), *(other.length for other in others)]
    expected = sum(map(len, known)) + sum(other.expected for other in others)
    costs = drafting_of(batch).costs
    found = worth_verifying(lengths, expected, all_guesses, costs, writing)
    return [
        Proposal(
            drafter="denoiser" if drafted else "lookup",
            tokens=[guess.token for guess in taken],
            parents=[1 + guess.parent for guess in taken],
            length=len(own) + len(taken),
            expected=sum((guess.sure for guess in taken), float(len(own))),
            sure=0.0 if first is None else first.sure,
        )
        for own, first, taken in zip(known, firsts, found, strict=True)
    ]


def worth_verifying(
    lengths: Sequence[int],
    expected: float,
    guesses: Sequence[Iterator[Guess]],
    costs: BatchCosts,
    writing: float = 0.0,
) -> list[list[Guess]]:
    """As much of each row's guesses as gives the batch the most tokens for what the pass costs.

    lengths: tokens of each row that are verified in any case, by which `expected` tokens of all
    come to stand; those of rows without guesses come last. guesses: the likeliest first; no more
    are asked for than may be worth it. writing: what the guesses have cost.
    """
    sizes = [*lengths]
    # What a pass costs is a matter of all its tokens, or of its longest row.
    each = [
        zip(count(size), repeat(index), own)
        for index, (size, own) in enumerate(zip(lengths, guesses, strict=False))
    ]
    in_order = merge(*each, key=itemgetter(0) if costs.is_padded else _doubt)
    taken: list[tuple[int, Guess]] = []
    num_best, gain = 0, expected / (writing + costs.of_pass(sizes))
    for _, index, guess in in_order:
        if guess.sure < gain * costs.least_more(sizes):
            break
        sizes[index] += 1
        expected += guess.sure
        taken.append((index, guess))
        found = expected / (writing + costs.of_pass(sizes))
        if found > gain:
            num_best, gain = len(taken), found
    best: list[list[Guess]] = [[] for _ in guesses]
    for index, guess in taken[:num_best]:
        best[index].append(guess)
    return best


def _doubt(entry: tuple[int, int, Guess]) -> float:
    return -entry[2].sure


def _guesses(
    row: Row, batch: Batch, forced: Sequence[int], drafted: Sequence[Candidates]
) -> Iterator[Guess]:
    """What may follow a row's tokens and those that must."""
    if row.lookup is None:
        copies = row.options.drafts != "denoiser"
        row.lookup = Lookup(batch.ngrams if copies else (), copies)
    done, end = row.lookup.num_tokens, len(row.prompt) + len(row.tokens)
    row.lookup.extend(row.between(done, end))
    begin = 1 + len(forced)
    most = max(0, min(max(1 + MAX_DRAFT, begin + len(drafted)), row.num_left) - begin)
    # Only a denoiser gives several tokens for one position.
    most_ways = 1 + NUM_OTHERS if drafted and drafting_of(batch).may_branch else 1
    return row.lookup.guesses(forced, most, drafted, most_ways, row.options.eos_token_id)
