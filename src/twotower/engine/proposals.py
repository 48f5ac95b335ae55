"""What is proposed to a row: as much of what probably follows its text as is worth verifying."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from twotower.engine.batch import Batch
from twotower.engine.drafts import BatchCosts, Drafting, Proposal
from twotower.engine.drafts_lookup import Candidates, Lookup
from twotower.engine.row import Row
from twotower.model.draft_tree import MAX_TOKENS

MAX_DRAFT = 15  # tokens, where the denoiser wrote no more: with the newest one 16
NUM_OTHERS = 2  # next most probable tokens at each position of a draft that may branch


def drafting_of(batch: Batch) -> Drafting:
    """What decides about the batch's drafts, worked out once while its rows stay the same."""
    if batch.drafting is None:
        model, num_rows = batch.model, len(batch.rows)
        # An accelerator's arithmetic waits for weights where rows are few: a CPU's does not.
        costs = BatchCosts(model.pass_costs, num_rows if model.context_device.type == "cpu" else 1)
        # Of a block larger than a tree only a chain may be verified.
        is_small = batch.rows[0].options.block_size <= MAX_TOKENS
        may_branch = model.verifies_trees and is_small and not batch.needs_host
        others, zeros = NUM_OTHERS if may_branch else 0, torch.zeros(num_rows)
        sampler = replace(batch.sampler, temperature=zeros, num_others=others)
        batch.drafting = Drafting(costs, sampler, may_branch)
    return batch.drafting


def propose(
    row: Row,
    batch: Batch,
    known: Sequence[int],
    drafted: Sequence[Candidates] = (),
    writing: float = 0.0,
) -> Proposal:
    """What probably follows a row's tokens and the known ones, as much of it as is worth verifying,
    if anything. drafted: by the denoiser, whose passes took `writing` AR steps.
    """
    if row.lookup is None:
        copies = row.options.drafts != "denoiser"
        row.lookup = Lookup(batch.ngrams if copies else (), copies)
    done, end = row.lookup.num_tokens, len(row.prompt) + len(row.tokens)
    row.lookup.extend(row.between(done, end))
    begin = 1 + len(known)
    most = max(0, min(max(1 + MAX_DRAFT, begin + len(drafted)), row.num_left) - begin)
    # Only a denoiser gives several tokens for one position.
    drafting = drafting_of(batch)
    most_ways = 1 + NUM_OTHERS if drafted and drafting.may_branch else 1
    costs, more = drafting.costs.of_drafts(begin, most)
    # Tokens that add less than is gained without any for their cost lengthen no draft.
    least = [begin / (writing + costs[0]) * each for each in more]
    guess = row.lookup.guess(known, most, drafted, most_ways, row.options.eos_token_id, least)
    expected = list(accumulate([float(begin), *guess.sure]))
    length, gain = best_length(expected, costs[: len(expected)], writing)
    return Proposal(
        drafter="denoiser" if drafted else "lookup",
        gain=gain,
        tokens=guess.tokens[:length],
        parents=[1 + parent for parent in guess.parents[:length]],
        expected=expected[length],
        sure=guess.sure[0] if guess.sure else 0.0,
    )


def best_length(
    expected: Sequence[float], costs: Sequence[float], writing: float = 0.0
) -> tuple[int, float]:
    """How many tokens of a draft to verify, and what is gained. expected: tokens of the cycle with
    none, 1, 2 ... of them; costs: of a pass over those, in AR steps; writing: of the draft.
    """
    gains = [tokens / (writing + cost) for tokens, cost in zip(expected, costs, strict=True)]
    count = max(range(len(gains)), key=gains.__getitem__)
    return count, gains[count]
