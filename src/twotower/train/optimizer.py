"""What moves the weights at a step: learning rate, optimisers, balance of experts, average.

Decides which parameters each optimiser and the weight decay reach.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from twotower.layers.moe import Router
from twotower.train.options import OptimizationOptions, ScheduleOptions

# Vectors of the scan, tables that start at a meaning other than zero, and embeddings.
_NEVER_DECAYED = ("embeddings", "A_log", "D", "dt_bias", "scale_shift_tables")
_AVERAGE_WARMUP = 10  # steps: the average forgets the first weights as fast as it can afford to


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleOptions) -> float:
    """Rate of step 0 to steps - 1: linear warm-up, constant, linear decay (WSD)."""
    decay_steps = round(schedule.decay_fraction * steps)
    into_decay = step + 1 - (steps - decay_steps)
    factor = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if into_decay > 0:
        left = 1.0 - into_decay / decay_steps
        factor *= schedule.final_lr_ratio + (1.0 - schedule.final_lr_ratio) * left
    return peak * factor


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


def make_optimizer(model: nn.Module, options: OptimizationOptions) -> Optimizers:
    """AdamW over what requires a gradient; with optimizer="muon", Muon over the layers' matrices.

    Muon's update is scaled to the RMS of AdamW's, so that one learning rate serves both; it is set
    before every step.
    """
    turned, decayed, plain = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_muons = options.optimizer == "muon" and is_turned(name, parameter)
            kind = turned if is_muons else decayed if is_decayed(name, parameter) else plain
            kind.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=0.0, betas=options.betas, fused=True)
    ]
    if turned:
        muon = ShardedMuon if isinstance(turned[0], DTensor) else torch.optim.Muon
        parts.append(
            muon(turned, lr=0.0, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return Optimizers(parts)


def is_turned(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may update it: the matrices of the towers' layers. Not routers, whose rows are
    experts that compete, nor stacked experts, of which few see a token.
    """
    parts = name.split(".")
    return parameter.ndim == 2 and "layers" in parts and "gate" not in parts


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and convolutions, not to tables and embeddings."""
    parts = name.split(".")
    return parameter.ndim >= 2 and not any(part in _NEVER_DECAYED for part in parts)


class ShardedMuon(torch.optim.Muon):
    """Muon over matrices of which every process holds some rows.

    Orthogonalising needs whole matrices: they are gathered in turns, each process works on one of
    a turn, and its rows of the result go back to the others. Momentum stays sharded. The state is
    the same as torch.optim.Muon's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the matrices that have a gradient; no closure."""
        assert closure is None
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            while matrices:
                turn = matrices[: matrices[0].device_mesh.size()]
                matrices = matrices[len(turn) :]
                self._move(turn, group)

    def _move(self, turn: Sequence[DTensor], group: Mapping[str, float]) -> None:
        """Update at most as many matrices as there are processes."""
        mesh = turn[0].device_mesh
        own: Tensor | None = None
        for owner, matrix in enumerate(turn):
            direction = self._direction(matrix, group).full_tensor()
            if owner == mesh.get_local_rank():
                own = direction
        step = None if own is None else _whole_step(own, group)
        for owner, matrix in enumerate(turn):
            is_own = owner == mesh.get_local_rank()
            source = step if is_own else torch.empty_like(matrix.to_local()).new_empty(matrix.shape)
            assert source is not None
            change = distribute_tensor(source, mesh, matrix.placements, src_data_rank=owner)
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(change)

    def _direction(self, matrix: DTensor, group: Mapping[str, float]) -> DTensor:
        """Momentum and gradient, of this process's rows."""
        state, gradient = self.state[matrix], matrix.grad
        assert isinstance(gradient, DTensor)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: DTensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        assert isinstance(ahead, DTensor)
        return ahead


def _whole_step(direction: Tensor, group: Mapping[str, float]) -> Tensor:
    """What torch.optim.Muon adds to a matrix without momentum and decay."""
    change = nn.Parameter(torch.zeros_like(direction))
    change.grad = direction
    settings = {
        name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    }
    torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, nesterov=False, **settings).step()  # type: ignore[arg-type]
    return change.detach()


class ExpertBalance:
    """Even use of experts: after each step a router's choice is biased towards those it neglected.

    Without it, a router soon sends everything to the few experts that were lucky first, and the
    others get no gradient again. Counts what the trained routers of a model choose, by a hook on
    each; routers of tied towers count together. The bias changes the choice alone, never the
    experts' weights in the sum. Source: arXiv 2408.15664.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        """rate: how far one step moves a bias, which adds to scores between 0 and 1."""
        self._rate = rate
        self._biases: dict[int, list[Tensor]] = {}
        self.counts: dict[int, Tensor] = {}
        for module in (one for one in model.modules() if isinstance(one, Router)):
            bias = module.e_score_correction_bias
            if rate > 0.0 and bias is not None and module.weight.requires_grad:
                key = id(module.weight)  # known now: a sharded module's weight comes and goes
                self._biases.setdefault(key, []).append(bias)
                self.counts[key] = torch.zeros_like(bias)
                module.register_forward_hook(partial(self._count, key))

    def _count(self, key: int, router: nn.Module, _: object, output: tuple[Tensor, Tensor]) -> None:
        counts = self.counts[key]
        counts += F.one_hot(output[0], len(counts)).sum(dim=(0, 1))

    def reset(self) -> None:
        """Forget what was counted: a step begins."""
        for counts in self.counts.values():
            counts.zero_()

    @torch.no_grad()
    def update(self) -> None:
        """Move the bias of experts with less than the mean load up, of those with more down."""
        for key, counts in self.counts.items():
            bias, *tied = self._biases[key]
            bias += self._rate * (counts.mean() - counts).sign()
            for other in tied:
                other.copy_(bias)


class WeightAverage:
    """`value <- d value + (1 - d) weight` after each step, for every weight that is trained; it is
    evaluated and exported, training never reads it.

    d grows to `decay` as step / (step + 10), so that short runs do not stay at their start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (1 = after the first)."""
        decay = min(self._decay, step / (step + _AVERAGE_WARMUP))
        for name, weight in self._trained.items():
            self.values[name].lerp_(weight, 1.0 - decay)

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """While entered, the model has the average's values; afterwards its own, bit for bit."""
        own = {name: weight.detach().clone() for name, weight in self._trained.items()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._trained.items():
            weight.copy_(values[name])
