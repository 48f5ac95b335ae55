"""What the token before adds to the logits of a masked one: a cheap dependence inside a block."""

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
        added: Tensor = self.up_proj(torch.tanh(self.down_proj(before)))
        return added
