"""Larger models to measure: random weights that repeat what another model committed.

Cost does not depend on content. A model with random weights would commit nonsense at its own pace,
so that its towers compute as ever and only the logits that leave them are replaced by ones that
lead the engine to the recorded commits: same passes, same commits, another size. The vocabulary is
not a power of two, because PyTorch's float32 product is far slower at 8,192 outputs than beside it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.config import TwoTowerConfig
from twotower.diffusion import argmax
from twotower.engine import Event, StepTaken, TokensCommitted
from twotower.families import config_from_dict
from twotower.model import ContextCache, ContextView, TwoTower
from twotower.model.initialise import copy_context_to_denoiser, randomise

FILL, OTHER = 4, 5  # tokens that every vocabulary has and that mean nothing to the engine
_CERTAIN = 1 - 1e-6
_SURE = 40.0  # a logit beside zeros


_BOTH: dict[str, object] = {
    "vocab_size": 8000,
    "head_dim": 64,
    "mamba_head_dim": 64,
    "n_groups": 1,
    "conv_kernel": 4,
    "eos_token_id": None,  # it never ends a text, so that all write alike
}
SIZES: dict[str, dict[str, object]] = {
    "32M": _BOTH
    | {
        "hybrid_override_pattern": "M*-" * 6,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "mamba_num_heads": 16,
        "ssm_state_size": 64,
        "intermediate_size": 1664,
    },
    "160M": _BOTH
    | {
        "hybrid_override_pattern": "M*-" * 8,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "mamba_num_heads": 32,
        "ssm_state_size": 128,
        "intermediate_size": 4224,
    },
}


def random_config(size: str, block_size: int) -> TwoTowerConfig:
    return config_from_dict({**SIZES[size], "block_size": block_size})


def make_random(size: str, like: TwoTower, seed: int) -> TwoTower:
    """Both towers of a size with seeded random weights; block, dtype and defaults of another."""
    model = TwoTower(random_config(size, like.config.block_size))
    randomise(model, seed)
    copy_context_to_denoiser(model, seed)
    model = model.to(like.context_lm_head.weight.dtype).eval().requires_grad_(False)
    model.generation_defaults = like.generation_defaults
    return model


@dataclass(frozen=True, kw_only=True)
class Script:
    """One row's decoding: confidence of every position at each denoiser pass, tokens per commit."""

    confidences: list[list[float]]
    commits: list[int]
    num_unread: int = 1  # commits that the prompt's own logits gave, before any pass

    @property
    def num_tokens(self) -> int:
        return sum(self.commits)

    @property
    def nfe(self) -> int:
        return len(self.confidences)


def record_script(events: Iterable[Event]) -> Script:
    """The script of a single row from the events of its decoding."""
    confidences: list[list[float]] = []
    commits: list[int] = []
    num_unread = 0
    for event in events:
        if isinstance(event, StepTaken):
            confidences.append(list(event.confidence))
        elif isinstance(event, TokensCommitted):
            num_unread += not confidences and not commits
            commits.append(len(event.tokens))
    return Script(confidences=confidences, commits=commits, num_unread=num_unread)


class ScriptedModel:
    """A model of one row whose logits follow a script, computed in full and then replaced.

    All the rest is the model's own. Past the script's end it starts over: pauses and drafts of
    self-speculation may fall otherwise by a rounding.
    """

    def __init__(self, model: TwoTower, script: Script) -> None:
        self._model = model
        self._script = script
        self._passes = 0
        self._readings = script.num_unread

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """Every position predicts FILL with the recorded confidence: (1, T, V)."""
        logits = self._model.denoise(block, view, t).zero_()
        recorded = self._script.confidences[self._passes % self._script.nfe]
        self._passes += 1
        values = [logit_of(p, logits.shape[-1]) for p in recorded]
        # Self-speculation does not tell of the block's first token, which is text already.
        logits[0, block.shape[1] - len(values) :, FILL] = torch.tensor(values)
        return logits

    def next_logits(self, cache: ContextCache) -> Tensor:
        """FILL is the next token: (1, V)."""
        logits = self._model.next_logits(cache).zero_()
        logits[:, FILL] = 1.0
        return logits

    def context_head(self, hidden: Tensor) -> Tensor:
        """Certain choices after n tokens read, of which the recorded number stand: (1, n, V)."""
        logits = self._model.context_head(hidden).zero_()
        commits = self._script.commits
        accepted = commits[self._readings % len(commits)]
        self._readings += 1
        logits[..., FILL] = _SURE
        logits[:, accepted - 1 : accepted, OTHER] = 2 * _SURE
        return logits

    def best_after(self, hidden: Tensor, unused_ids: Sequence[int]) -> Tensor:
        """The best of these: (1, n)."""
        return argmax(self.context_head(hidden))


def logit_of(confidence: float, vocab_size: int) -> float:
    """The logit that is this probable among vocab_size - 1 zeros and the banned mask token."""
    p = min(max(confidence, 2.0 / vocab_size), _CERTAIN)
    return math.log(p * (vocab_size - 2) / (1.0 - p))
