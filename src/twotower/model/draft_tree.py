"""Drafts that branch: one pass verifies several ways in which a text may go on.

Each token of a row of drafts follows its parent, an earlier token of the row, and sees what it
follows alone. Also known as tree attention. Source: arXiv 2305.09781.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from twotower.model.state import ForwardOutput

MAX_TOKENS = 32  # of a row: what a token sees is a number of as many bits


class DraftTree:
    """What each token of drafts (B, L) follows: parents[b][i] < i, -1 for the first of a row and
    for padding, which sees itself alone. A row may be shorter than L, the longest.

    ValueError (one line) for a row of more than 32 tokens.
    """

    def __init__(self, parents: Sequence[Sequence[int]]) -> None:
        self.parents, self.length = parents, max(map(len, parents))
        if self.length > MAX_TOKENS:
            raise ValueError(
                f"a draft of {self.length} tokens branches; must have at most {MAX_TOKENS}"
            )
        self.depths = np.zeros((len(parents), self.length), np.int32)
        """Tokens of the row that come before each, (B, L)."""
        self.sees = np.tile(1 << np.arange(self.length), (len(parents), 1)).astype(np.uint32)
        """Which tokens each attends to, itself among them: a bit for each index, (B, L)."""
        for own, depths, sees in zip(parents, self.depths, self.sees, strict=True):
            for index, parent in enumerate(own):
                if parent >= 0:
                    depths[index] = depths[parent] + 1
                    sees[index] |= sees[parent]

    @cached_property
    def mask(self) -> Tensor:
        """`sees` as bool (B, 1, L, L)."""
        bits = torch.tensor(self.sees.astype(np.int64)).unsqueeze(-1) >> torch.arange(self.length)
        return (bits & 1).bool().unsqueeze(1)

    def paths(
        self, drafts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """The indices of each row's tokens that stand: the first, and each that follows one of them
        and is the token chosen there. choices (B, L): behind each token.
        """
        paths = []
        for parents, tokens, chosen in zip(self.parents, drafts, choices, strict=True):
            path = [0]
            for index, parent in enumerate(parents):
                if parent == path[-1] and tokens[index] == chosen[parent]:
                    path.append(index)
            paths.append(path)
        return paths


def along_paths(output: ForwardOutput, paths: Sequence[Sequence[int]]) -> ForwardOutput:
    """The output of a pass over such drafts, ready to be committed: the tokens at each row's path
    come first, in its order.
    """
    hidden = output.hidden
    for row, path in enumerate(paths):
        if path[-1] == len(path) - 1:
            continue  # nothing lies before it
        hidden = hidden.clone() if hidden is output.hidden else hidden
        hidden[row, : len(path)] = hidden[row, torch.tensor(path)]
        output.move_keys(row, path)
    return output._replace(hidden=hidden)
