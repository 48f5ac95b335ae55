"""Learning rate by step, and which parameters each optimiser and the weight decay reach."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from twotower.train.options import DecayShape, TrainOptions
from twotower.train.parallel import ShardedMuon

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


class Optimizers:
    """One or more torch optimisers that step together, behind the interface of one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(part.param_groups for part in self.parts)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {str(place): part.state_dict() for place, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for place, part in enumerate(self.parts):
            part.load_state_dict(state[str(place)])


def make_optimizer(model: nn.Module, options: TrainOptions) -> Optimizers:
    """AdamW over what requires a gradient; with optimizer="muon", Muon over the layers' matrices.

    Muon's update is scaled to the RMS of AdamW's, so that one learning rate serves both.
    """
    turned: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if options.optimizer == "muon" and is_turned(name, parameter):
            turned.append(parameter)
        else:
            is_plain = not is_decayed(name, parameter, options.decay_embeddings)
            (plain if is_plain else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, fused=True)
    ]
    if turned:
        muon = ShardedMuon if isinstance(turned[0], DTensor) else torch.optim.Muon
        parts.append(
            muon(
                turned,
                lr=options.learning_rate,
                weight_decay=options.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return Optimizers(parts)


def is_turned(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may update it: the matrices of the towers' layers. Not routers, whose rows are
    experts that compete, nor stacked experts, of which few see a token.
    """
    parts = name.split(".")
    return parameter.ndim == 2 and "layers" in parts and "gate" not in parts


def is_decayed(name: str, parameter: nn.Parameter, decay_embeddings: bool) -> bool:
    """Whether weight decay applies: matrices and convolutions yes; vectors, tables, embeddings
    no.
    """
    parts = name.split(".")
    if parameter.ndim < 2 or any(part in _NEVER_DECAYED for part in parts):
        return False
    return decay_embeddings or "embeddings" not in parts
