"""Even use of experts: after each step a router's choice is biased towards those it neglected.

Without it, a router soon sends everything to the few experts that were lucky first, and the others
get no gradient again. The bias sways the choice alone, never the experts' weights in the sum.
Source: auxiliary-loss-free balancing, arXiv 2408.15664.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.layers.moe import Router


class ExpertBalance:
    """Counts what the trained routers of a model choose, by a hook on each, and moves their
    `e_score_correction_bias`; routers of tied towers count together.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        """rate: how far one step moves a bias, which adds to scores between 0 and 1."""
        self._rate = rate
        self._routers: dict[int, list[Router]] = {}
        self.counts: dict[int, Tensor] = {}
        for module in model.modules():
            if rate > 0.0 and isinstance(module, Router) and module.weight.requires_grad:
                key = id(module.weight)  # known now: a sharded module's weight comes and goes
                self._routers.setdefault(key, []).append(module)
                self.counts[key] = torch.zeros_like(module.e_score_correction_bias)
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
            first, *tied = self._routers[key]
            bias = first.e_score_correction_bias
            bias += self._rate * (counts.mean() - counts).sign()
            for router in tied:
                router.e_score_correction_bias.copy_(bias)
