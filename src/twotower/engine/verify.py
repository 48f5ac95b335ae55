"""The context tower reads what is drafted behind a text, and chooses: one token or many.

A draft decides only how many tokens a pass yields; without one it yields the next. Where a row
needs no more than its logits and its noise, a `ChoosingBackend` chooses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.engine.batch import Batch, Chosen, padded
from twotower.engine.logits import best_tokens, choose_tokens, noise_of, with_logprobs
from twotower.model.draft_tree import DraftTree, along_paths


def verify(batch: Batch, most_steps: int = 1) -> list[Chosen]:
    """Keep of each draft what the AR tower chooses too, and its own token behind that.

    most_steps: AR steps that a backend which chooses may make; above 1 without drafts alone.
    """
    drafts = [draft.tokens for draft in batch.drafts]
    ids, counts = padded(drafts)
    lengths, most = counts.tolist(), ids.shape[1]
    if batch.chooser is not None:
        steps = min(most_steps, batch.chooser.decode_steps)
        size = max(steps, most), batch.model.config.vocab_size
        noise = noise_of(batch.rows, batch.sampler, *size)
        found = batch.chooser.decode(batch.cache, ids, counts, batch.sampler, noise, steps)
        for row in batch.rows:
            row.context_forwards += min(steps, row.num_left)
        each = zip(*map(Tensor.tolist, found), strict=True)
        return [Chosen(own[:count]) for own, count in each]
    is_draft = most > 1  # the newest token always stays
    is_tree = any(draft.has_branches for draft in batch.drafts)
    tree = DraftTree([draft.parents for draft in batch.drafts]) if is_tree else None
    output = batch.model.verify(batch.cache, ids, counts if is_draft else None, is_draft, tree)
    if batch.is_plain:
        logits, choices = None, _best_tokens(batch, output.hidden, lengths)
    else:
        logits = batch.model.context_head(output.hidden)
        behind = [draft[1:] for draft in drafts]
        choices = choose_tokens(batch.rows, logits, batch.sampler, behind, tree)
    answers = choices.tolist()
    if tree is None:
        each = zip(drafts, answers, strict=True)
        tokens = [own[: _num_right(draft, own)] for draft, own in each]
    else:
        paths = tree.paths(drafts, answers)
        tokens = [[own[at] for at in path] for own, path in zip(answers, paths, strict=True)]
        output = along_paths(output, paths)
    chosen = with_logprobs(batch.rows, logits, tokens)
    batch.commit(output, torch.tensor([len(own) for own in tokens]))
    return chosen


def _num_right(draft: Sequence[int], choices: Sequence[int]) -> int:
    """How many tokens of a row's draft stand: the first, and each that the choice before it equals.
    On the host: a small model waits for tensors, too.
    """
    wrong = (at for at in range(1, len(draft)) if draft[at] != choices[at - 1])
    return next(wrong, len(draft))


def _best_tokens(batch: Batch, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """The best token after each of hidden (B, n, D), (B, n): the head is a fifth of a small model,
    and only where a row has tokens, so many, does it run.
    """
    unused = batch.sampler.unused_ids
    if min(lengths) == max(lengths):
        return best_tokens(batch.model, hidden, unused)
    is_token = torch.arange(hidden.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    choices = torch.zeros(is_token.shape, dtype=torch.int64)
    choices[is_token] = best_tokens(batch.model, hidden[is_token.to(hidden.device)], unused)
    return choices
