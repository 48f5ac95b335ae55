"""How tokens are chosen inside a pass: a batch's sampler at fixed addresses.

What of it decides which operations run (`Uses`) the host knows; the numbers lie on the device.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.diffusion import Sampler, sample

_PER_ROW = ("temperature", "top_k", "top_p", "min_p", "threshold")


class Uses(NamedTuple):
    """What any row asks of the choice: a recording is of one of these."""

    noise: bool
    min_p: bool
    ranks: bool
    ban: bool


class Choosing:
    """The sampler of up to B rows, noise (B, L, V), and ids that are no token."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        def numbers(dtype: torch.dtype) -> Tensor:
            return torch.ones(num_rows, dtype=dtype, device=device)

        self._values = Sampler(
            temperature=numbers(torch.float32),
            top_k=numbers(torch.int64),
            top_p=numbers(torch.float32),
            min_p=numbers(torch.float32),
            steps=torch.empty(0),
            threshold=numbers(torch.float32),
            mask_token_id=-1,  # passes know it
        )
        self.steps = numbers(torch.int64)  # denoiser passes that rows still have
        self._noise: dict[tuple[int, int], Tensor] = {}
        self._banned: dict[int, Tensor] = {}
        self._unused: dict[int, Sequence[int]] = {}  # what is banned, by the vocabulary's size
        self._held: object = None

    def load(self, sampler: Sampler, unused_ids: Sequence[int], vocab_size: int) -> Uses:
        """Hold a sampler's numbers; what is held already is not copied again."""
        if self._held is not sampler:
            self._held = sampler
            for name in _PER_ROW:
                values = getattr(sampler, name)
                getattr(self._values, name)[: len(values)] = values
        banned = self._banned_of(vocab_size)
        if unused_ids != self._unused.get(vocab_size, ()):
            self._unused[vocab_size] = unused_ids
            banned.zero_()
            banned[torch.tensor(unused_ids, device=banned.device)] = True
        return Uses(not sampler.is_greedy, sampler.has_min_p, sampler.has_ranks, bool(unused_ids))

    def _banned_of(self, vocab_size: int) -> Tensor:
        if vocab_size not in self._banned:
            self._banned[vocab_size] = self.steps.new_zeros(vocab_size, dtype=torch.bool)
        return self._banned[vocab_size]

    def noise(self, length: int, vocab_size: int) -> Tensor:
        """Where the noise of passes over L tokens lies."""
        if (length, vocab_size) not in self._noise:
            rows = self._values.temperature
            self._noise[length, vocab_size] = rows.new_zeros(len(rows), length, vocab_size)
        return self._noise[length, vocab_size]

    def sampler(self, uses: Uses) -> Sampler:
        """The sampler on the device, for recordings of these uses."""
        steps = self.steps.clamp(min=1)  # a row that is done may have fewer
        return replace(self._values, steps=steps, has_min_p=uses.min_p, has_ranks=uses.ranks)

    def choose(self, logits: Tensor, uses: Uses) -> Tensor:
        """`diffusion.choose`: logits (B, L, V) -> (B, L)."""
        length, vocab_size = logits.shape[1:]
        if uses.ban:
            logits = logits.masked_fill(self._banned[vocab_size], float("-inf"))
        noise = self.noise(length, vocab_size) if uses.noise else None
        return sample(logits, self.sampler(uses), noise)
