"""Training of a thin denoiser on cached features, for as long as is given.

A step's answers and blocks are a function of (seed, step): a run that was killed goes on as if it
had not been.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from twotower.adapt.features import Features, Place
from twotower.adapt.files import reading, save_whole
from twotower.adapt.objective import (
    anchor_at,
    backbone_probabilities,
    choose_drafts,
    draft_logits,
    random_starts,
    targets_of,
    weighted_loss,
)
from twotower.adapt.options import StepOptions, WorkFolder
from twotower.model import TwoTower
from twotower.model.thin import trained_parameters
from twotower.model.training import add_true_bigrams
from twotower.train.optimizer import make_optimizer
from twotower.train.options import OptimizationOptions

_POOL = 16  # steps whose answers are drawn at once and sorted by length
_MIN_RATE = 0.02  # of the largest learning rate, at the end
_AT_ONCE = 64  # blocks that are measured at once
_NEW = "a new denoiser"
_WEIGHT = "weight"  # among the optimiser's own keys in a file


def places_of_step(places: Sequence[Place], step: int, options: StepOptions) -> list[Place]:
    """The answers of a step: random ones, of similar lengths, so that little of them is padding."""
    pool, turn = divmod(step, _POOL)
    draw, count = np.random.default_rng([options.seed, pool]), options.answers_per_step
    chosen = [places[i] for i in draw.integers(len(places), size=_POOL * count)]
    chosen.sort(key=lambda place: place.last - place.first)
    first = int(draw.permutation(_POOL)[turn]) * count
    return chosen[first : first + count]


def draft_numbers(model: TwoTower) -> Tensor | None:
    """Each id's number in the draft vocabulary (vocabulary,), -1 where it has none; None where it
    is the whole one.
    """
    if model.draft_ids is None:
        return None
    numbers = torch.full((model.config.vocab_size,), -1, device=model.draft_ids.device)
    numbers[model.draft_ids] = torch.arange(len(model.draft_ids), device=numbers.device)
    return numbers


def _precision(model: TwoTower) -> torch.autocast:
    """bfloat16 products where the device has instructions for them, which take half of float32's
    time or less, and beside a backbone that is not in float32: what the denoiser shares with it is
    in its dtype. Weights and moments are float32.
    """
    device, dtype = model.denoiser_device.type, model.context_tower.norm_f.weight.dtype
    is_wanted = has_bfloat16_products(device) or dtype != torch.float32
    return torch.autocast(device, torch.bfloat16, enabled=is_wanted)


@cache
def has_bfloat16_products(device: str) -> bool:
    """Whether a type of device multiplies bfloat16 itself; a processor by AVX-512, AMX or ARM's."""
    if device != "cpu":
        return device == "cuda"
    return any(has and name.endswith("bf16") for name, has in torch.cpu.get_capabilities().items())


class Trainer:
    """A denoiser, its optimiser, and how far they are. start: the denoiser that it was, if any."""

    def __init__(
        self, model: TwoTower, features: Features, options: StepOptions, start: str | None = None
    ) -> None:
        self._start = _NEW
        if start is not None:
            self._start = str(Path(start).resolve() if Path(start).exists() else start)
        self.model, self.step, self.seconds = model, 0, 0.0  # of the budget, as the caller counts
        self._features, self._options, self._numbers = features, options, draft_numbers(model)
        self._parameters = trained_parameters(model)
        chosen = OptimizationOptions(optimizer=options.optimizer, weight_decay=options.weight_decay)
        self._optimizer = make_optimizer(model, chosen)

    def take_step(self, places: Sequence[Place], used: float) -> float:
        """One step on answers at some of the places, at the learning rate that belongs to the used
        share of the budget. Returns the loss, nats a token, as they are weighted.
        """
        options, device = self._options, self.model.denoiser_device
        rows = self._features.rows(places_of_step(places, self.step, options))
        shape = len(rows.starts), options.blocks_per_answer
        uniform = np.random.default_rng([options.seed, 1, self.step]).random(shape)
        starts = random_starts(rows, torch.from_numpy(uniform)).to(device)
        rows = rows.to(device)
        blocks = anchor_at(rows, starts, self.model.config.block_size)
        with _precision(self.model):
            logits = add_true_bigrams(
                self.model, draft_logits(self.model, rows, blocks), blocks.clean
            )
            share = options.soft_targets
            wanted = backbone_probabilities(self.model, rows, blocks) if share > 0 else None
        targets = targets_of(blocks, self._numbers)
        loss, weight = weighted_loss(logits.float(), targets, options.loss_decay, wanted, share)
        mean = loss / weight.clamp(min=1e-6)
        if not mean.isfinite():
            raise ValueError(
                f"learning_rate={options.learning_rate:g} is too high: the loss is {mean.item()} "
                f"at step {self.step}; use a lower one, and remove "
                f"{WorkFolder(Path()).checkpoint} from --work if it is there"
            )
        mean.backward()
        nn.utils.clip_grad_norm_(self._parameters.values(), options.max_grad_norm)
        self._optimizer.set_learning_rate(self._rate(used))
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return mean.item()

    def _rate(self, used: float) -> float:
        warm = min(1.0, (self.step + 1) / max(1, self._options.warmup_steps))
        fall = _MIN_RATE + (1 - _MIN_RATE) * (1 + math.cos(math.pi * min(1.0, used))) / 2
        return self._options.learning_rate * warm * fall

    def save(self, file: Path) -> None:
        """Weights, moments and progress, whole or not at all."""
        tensors = {f"{_WEIGHT}:{name}": p.detach() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._state(parameter).items():
                tensors[f"{key}:{name}"] = value
        told = {"step": self.step, "seconds": self.seconds, "start": self._start}
        save_whole(tensors, file, {name: str(value) for name, value in told.items()})

    def load(self, file: Path) -> None:
        """The inverse of `save`; ValueError (one line) for the state of another denoiser, or of one
        that began elsewhere.
        """
        device, remedy = str(self.model.denoiser_device), "remove it, and the training begins anew"
        with reading(file, remedy), safe_open(file, framework="pt", device=device) as opened:
            told = opened.metadata()
            step, seconds = int(told["step"]), float(told["seconds"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if (start := told.get("start", self._start)) != self._start:
            raise ValueError(
                f"{file}: is of a training that began with {start}, not with {self._start}; give "
                "the same --denoiser, or remove it to begin with yours"
            )
        shapes = {f"{_WEIGHT}:{name}": p.shape for name, p in self._parameters.items()}
        if any(n not in tensors or tensors[n].shape != shape for n, shape in shapes.items()):
            raise ValueError(
                f"{file}: is of a denoiser of another shape; give the same options, or remove it, "
                "and the training begins anew"
            )
        for key_and_name, value in tensors.items():
            key, _, name = key_and_name.partition(":")
            parameter = self._parameters[name]
            if key == _WEIGHT:
                parameter.data.copy_(value)
            else:
                self._state(parameter)[key] = value
        self.step, self.seconds = step, seconds

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimiser that moves a parameter keeps of it."""
        for part in self._optimizer.parts:
            if any(parameter is one for group in part.param_groups for one in group["params"]):
                state: dict[str, Tensor] = part.state[parameter]
                return state
        raise AssertionError("every trained parameter has an optimiser")


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """How far drafts agree with answers that were not trained on."""

    tokens_per_cycle: float
    """Of a draft and its verification, which always gives one token itself."""
    right: list[float]
    """Share of first, second and so on guessed tokens that are right, each by itself."""
    answers: int
    """On how many of them that was measured."""


@torch.no_grad()
def measure(
    model: TwoTower, features: Features, places: Sequence[Place], seconds: float = math.inf
) -> Acceptance:
    """What greedy decoding of the answers at some places would accept: of the first, as many as the
    time allows, at least one.
    """
    deadline, done = time.monotonic() + seconds, 0
    numbers, size, device = draft_numbers(model), model.config.block_size, model.denoiser_device
    tokens = cycles = 0
    right, count = torch.zeros(size - 1), torch.zeros(size - 1)
    for place in places:
        rows = features.rows([place]).to(device)
        first, last = int(rows.starts[0]), int(rows.lengths[0])
        hits = list[Tensor]()
        for starts in torch.arange(first, last, device=device).unsqueeze(0).split(_AT_ONCE, dim=1):
            blocks = anchor_at(rows, starts, size)
            with _precision(model):
                chosen = choose_drafts(model, draft_logits(model, rows, blocks), blocks)
            hits.append((chosen == targets_of(blocks, numbers))[0].cpu())
            right += hits[-1].sum(0)
            count += (blocks.clean[0, :, 1:] >= 0).sum(0).cpu()
        accepted, at = torch.cat(hits).long().cumprod(1).sum(1).tolist(), first
        while at < last - 1:
            step = min(accepted[at - first] + 1, last - 1 - at)
            tokens, cycles, at = tokens + step, cycles + 1, at + step
        done += 1
        if time.monotonic() > deadline:
            break
    return Acceptance(
        tokens_per_cycle=tokens / max(1, cycles),
        right=(right / count.clamp(min=1)).tolist(),
        answers=done,
    )
