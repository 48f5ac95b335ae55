"""What another engine makes of the next token, to compare with our distribution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.lab.bench.baselines import Baseline, Transformers


@torch.no_grad()
def next_logprobs(baseline: Baseline, ids: Sequence[int], vocab_size: int) -> Tensor:
    """Natural-log probability of every token of the vocabulary behind a prompt; NaN where the
    engine tells none.
    """
    if isinstance(baseline, Transformers):
        logits: Tensor = baseline._model(torch.tensor([list(ids)])).logits[0, -1]
        return logits.float().log_softmax(-1)
    answer = baseline._complete(ids, 1, n_probs=vocab_size)
    values = torch.full((vocab_size,), float("nan"))
    for entry in answer["completion_probabilities"][0]["top_logprobs"]:
        values[entry["id"]] = entry["logprob"]
    return values
