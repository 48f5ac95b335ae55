"""Mixture of experts: stacked experts and a shared one, and the router that chooses."""

import torch
from torch import Tensor, nn

from twotower.kernels import expert_products
from twotower.kernels.expert_products import GroupedMLP
from twotower.kernels.quantised import Matrices
from twotower.layers.mlp import MLP
from twotower.specs import MoESpec


class Router(nn.Module):
    """Choose M of E experts for each token. Source: system.md section 2, MoE; softmax: transformers
    5, Qwen3MoeTopKRouter.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, width: int, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.zeros(spec.num_experts, width))
        bias = torch.zeros(spec.num_experts) if spec.router == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (tokens, D) -> chosen experts, int64, and their weights, float32, both (tokens, M)."""
        spec = self.spec
        with torch.autocast(x.device.type, enabled=False):
            scores = self._scores(x)
        choice = scores
        if self.e_score_correction_bias is not None:
            choice = scores + self.e_score_correction_bias.double()
        if spec.num_groups > 1:
            choice = self._keep_best_groups(choice)
        chosen = choice.topk(spec.experts_per_token, dim=-1).indices
        weights = scores.gather(1, chosen)
        if spec.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, (weights * spec.scaling_factor).float()

    def _scores(self, x: Tensor) -> Tensor:
        """Of each expert (tokens, E)."""
        if self.spec.router == "softmax":
            return (x.float() @ self.weight.float().T).softmax(-1)
        # float64, as the released model: borderline choices differ in float32.
        return torch.sigmoid(x.double() @ self.weight.double().T)

    def _keep_best_groups(self, choice: Tensor) -> Tensor:
        """Scores (tokens, E) with those of all but the `groups_per_token` best groups set to 0."""
        groups: Tensor = choice.unflatten(1, (self.spec.num_groups, -1))
        best_two = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        kept = best_two.topk(self.spec.groups_per_token, dim=-1).indices
        mask = torch.zeros_like(best_two, dtype=torch.bool).scatter_(1, kept, True)
        return groups.masked_fill(~mask.unsqueeze(-1), 0.0).flatten(1)


class Experts(nn.Module):
    """E MLPs, stacked: up_proj (E, F, D), down_proj (E, D, F), gate_proj as up_proj if gated."""

    def __init__(self, num_experts: int, width: int, inner_width: int, gated: bool = False) -> None:
        super().__init__()
        inner = num_experts, inner_width, width
        self.gate_proj = nn.Parameter(torch.empty(inner)) if gated else None
        self.up_proj = nn.Parameter(torch.empty(inner))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner_width))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts (tokens, D): x (tokens, D), the others (tokens, M)."""
        return sum_experts(x, chosen, weights, self.up_proj, self.down_proj, self.gate_proj)


def sum_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Matrices,
    down: Matrices,
    gate: Matrices | None = None,
    mlp: GroupedMLP = expert_products.grouped_mlp,
) -> Tensor:
    """Weighted sum of the chosen of E experts (tokens, D): x (tokens, D), chosen and weights
    (tokens, M); up and gate E matrices (F, D), down E matrices (D, F), of any precision; mlp:
    `grouped_mlp`.
    """
    experts, order = chosen.flatten().sort(stable=True)  # pairs (token, choice), by expert
    token = order // chosen.shape[1]
    y = mlp(x[token], up, down, experts, gate)
    weighted = y.float() * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x, dtype=torch.float32).index_add_(0, token, weighted).to(x.dtype)


class MoE(nn.Module):
    """Routed experts, plus one shared expert that is always on where the spec has one.

    With a latent size the routed experts work between two projections that they share: router and
    shared expert see the full width.
    """

    def __init__(self, width: int, spec: MoESpec) -> None:
        super().__init__()
        inner = spec.latent_size or width
        self.gate = Router(width, spec)
        self.experts = Experts(spec.num_experts, inner, spec.intermediate_size, spec.gated)
        shared = spec.shared_intermediate_size
        self.shared_experts = MLP(width, shared, bias=False, gated=spec.gated) if shared else None
        self.fc1_latent_proj: nn.Module = nn.Identity()
        self.fc2_latent_proj: nn.Module = nn.Identity()
        if spec.latent_size is not None:
            self.fc1_latent_proj = nn.Linear(width, inner, bias=False)
            self.fc2_latent_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        routed: Tensor = self.experts(self.fc1_latent_proj(tokens), *self.gate(tokens))
        routed = self.fc2_latent_proj(routed).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)
