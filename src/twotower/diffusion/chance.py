"""Choice by chance: what top-k, top-p and min-p leave of logits, and the noise that decides.

The largest of logits plus Gumbel noise is a sample of their softmax.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.diffusion.sampler import Sampler


def column(values: Tensor, logits: Tensor) -> Tensor:
    """Values (B,), shaped to broadcast against logits (B, ..., V)."""
    return values.to(logits.device).view(-1, *[1] * (logits.ndim - 1))


def filter_logits(logits: Tensor, sampler: Sampler) -> Tensor:
    """Scale by 1/temperature and set what min-p, top-k and then top-p exclude to -inf.

    logits (B, ..., V); returns the same shape in float32, shifted so that the largest is 0
    (a tiny temperature cannot overflow). Temperature 0 leaves the scale alone. Tokens with less
    than min_p times the largest probability go; exactly top_k tokens stay, the lower id at a tie;
    top-p keeps the smallest set, at least one token, that reaches the mass top_p of what is left.
    """
    scale = column(sampler.temperature, logits).float()
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / torch.where(scale > 0, scale, 1.0)
    if sampler.has_min_p:
        least = column(sampler.min_p, logits).log()  # the largest logit is 0
        logits = logits.masked_fill(logits < least, float("-inf"))
    if not sampler.has_ranks:
        return logits
    k, p = column(sampler.top_k, logits), column(sampler.top_p, logits)
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ranked = ranked.masked_fill((k > 0) & (rank >= k), float("-inf"))
    probs = ranked.softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    beyond = (p < 1) & (mass_before >= p) & (rank > 0)
    ranked = ranked.masked_fill(beyond, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ranked)


def gumbel(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard Gumbel noise (len(generators), *shape), float32 on CPU.

    One CPU generator per row: a row's draws are the same alone and in any batch.
    """
    noise = torch.empty(len(generators), *shape)
    for row, generator in enumerate(generators):
        noise[row].exponential_(generator=generator)
    # the clamp keeps log finite: an infinite draw plus a filtered -inf would be NaN
    return noise.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_()


def draw_noise(
    logits: Tensor, sampler: Sampler, generators: Sequence[torch.Generator]
) -> Tensor | None:
    """Gumbel noise for choose, shaped like logits (B, ..., V); None if every row is greedy.

    Only rows with temperature > 0 draw; greedy rows get zeros and leave their generator alone.
    """
    rows = [row for row, value in enumerate(sampler.temperature.tolist()) if value > 0]
    if not rows:
        return None
    noise = gumbel(logits.shape[1:], [generators[row] for row in rows]).to(logits.device)
    if len(rows) == len(logits):
        return noise
    return torch.zeros_like(logits, dtype=torch.float32).index_copy_(
        0, torch.tensor(rows, device=logits.device), noise
    )
