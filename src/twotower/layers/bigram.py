"""What the token before adds to the logits of a masked one: a cheap dependence inside a block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Bigram(nn.Module):
    """A low-rank map from the embedding of a token to the logits of the next."""

    def __init__(self, width: int, rank: int, vocab_size: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, rank, bias=False)
        self.up_proj = nn.Linear(rank, vocab_size, bias=False)

    def forward(self, before: Tensor) -> Tensor:
        """Embeddings before (..., D) of the tokens before -> (..., V)."""
        added: Tensor = self.up_proj(self.inner(before))
        return added

    def inner(self, before: Tensor) -> Tensor:
        """The small side of the map: (..., D) -> (..., rank)."""
        return torch.tanh(self.down_proj(before))


def add_bigrams(
    logits: Tensor,
    block: Tensor,
    mask_token_id: int,
    draft_ids: Tensor | None,
    bigram: Callable[[Tensor], Tensor],
) -> Tensor:
    """Logits (B, T, V) with what the token before adds to each, in place and from left to right:
    the block's own (B, T), or the most probable where that is masked.

    bigram: token ids (B,) -> (B, V). draft_ids (V,): what the logits are of, where not all tokens.
    """
    given = block.to(logits.device).unbind(1)
    has_masks = masked_positions(block, mask_token_id)
    of_position = [logits.select(1, t) for t in range(block.shape[1])]
    for t in range(1, len(of_position)):
        before = given[t - 1]
        if has_masks[t - 1]:
            drafted = of_position[t - 1].argmax(-1)
            drafted = drafted if draft_ids is None else draft_ids[drafted]
            before = torch.where(before == mask_token_id, drafted, before)
        of_position[t].add_(bigram(before))
    return logits


def masked_positions(block: Tensor, mask_token_id: int) -> list[bool]:
    """Which positions of blocks (B, T) may be masked in any row. A GPU would have to be waited for:
    there all of them.
    """
    if block.device.type != "cpu":
        return [True] * block.shape[1]
    found: list[bool] = (block == mask_token_id).any(0).tolist()
    return found
