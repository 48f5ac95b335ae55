"""Learning rate by step, and which parameters the weight decay reaches."""

import math
from typing import Literal

import torch
from torch import nn

from twotower.train.options import DecayShape, TrainOptions

# Vectors of the scan and tables that start at a meaning other than zero.
_NEVER_DECAYED = ("A_log", "D", "dt_bias", "scale_shift_tables")


def learning_rate(step: int, options: TrainOptions) -> float:
    """Rate of optimiser step `step` (0 .. steps-1): linear warm-up, constant, decay at the end
    (WSD).
    """
    decay_steps = round(options.decay * options.steps)
    into_decay = step + 1 - (options.steps - decay_steps)
    factor = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    if into_decay > 0:
        left = _remaining(into_decay / decay_steps, options.decay_shape)
        factor *= options.final_lr_ratio + (1.0 - options.final_lr_ratio) * left
    return options.learning_rate * factor


def _remaining(progress: float, shape: DecayShape) -> float:
    """Share of the fall that is still to come; progress in (0, 1]."""
    return 1.0 - (math.sqrt(progress) if shape == "sqrt" else progress)


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient, in two groups: decayed and not."""
    groups: dict[Literal["decayed", "plain"], list[nn.Parameter]] = {"decayed": [], "plain": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = is_decayed(name, parameter, options.decay_embeddings)
            groups["decayed" if decayed else "plain"].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups["decayed"], "weight_decay": options.weight_decay},
            {"params": groups["plain"], "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=options.betas,
        fused=True,
    )


def is_decayed(name: str, parameter: nn.Parameter, decay_embeddings: bool) -> bool:
    """Whether weight decay applies: matrices and convolutions yes; vectors, tables, embeddings
    no.
    """
    parts = name.split(".")
    if parameter.ndim < 2 or any(part in _NEVER_DECAYED for part in parts):
        return False
    return decay_embeddings or "embeddings" not in parts


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
