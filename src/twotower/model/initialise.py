"""Weights before the first step: random for a new backbone, copies of the backbone for a
denoiser.
"""

import math

import torch
from torch import nn

from twotower.config import InitSpec
from twotower.layers.mamba2 import Mamba2
from twotower.model.two_tower import TwoTower

# Matrices whose output is added to the residual stream: scaled down by its number of summands.
_RESIDUAL = frozenset(("o_proj", "out_proj", "down_proj"))


@torch.no_grad()
def randomise(model: TwoTower, seed: int) -> None:
    """Fill all matrices from N(0, initializer_range) and the scan's parameters as Mamba-2 does.

    The same seed gives the same weights. Norms, biases and D keep their constructors' values.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.init
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "scale_shift_tables" in name:
            continue
        std = config.std
        # Stacked experts are parameters of that name themselves, other matrices lie in a module.
        if config.rescale_residual and not _RESIDUAL.isdisjoint(name.split(".")[-2:]):
            std /= math.sqrt(_depth(model, name))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    for module in model.modules():
        if isinstance(module, Mamba2):
            _randomise_scan(module, config, generator)


def _depth(model: TwoTower, name: str) -> int:
    """Layers of the tower that a parameter belongs to."""
    is_denoiser = name.startswith("denoiser_tower.")
    return (model.config.denoiser if is_denoiser else model.config.context).num_layers


def _randomise_scan(mixer: Mamba2, config: InitSpec, generator: torch.Generator) -> None:
    """Step sizes log-uniform in [time_step_min, time_step_max], decay rates uniform in [1, 16]."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    uniform = torch.rand(mixer.num_heads, generator=generator)
    step = (low + uniform * (high - low)).exp().clamp(min=config.time_step_floor)
    mixer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
    mixer.A_log.copy_((1 + 15 * torch.rand(mixer.num_heads, generator=generator)).log())
    # A depthwise filter has only W inputs: N(0, 0.02) would silence it.
    bound = 1 / math.sqrt(mixer.conv_width)
    mixer.conv1d.weight.copy_(
        (2 * torch.rand(mixer.conv1d.weight.shape, generator=generator) - 1) * bound
    )
    if mixer.conv1d.bias is not None:
        nn.init.zeros_(mixer.conv1d.bias)


@torch.no_grad()
def copy_context_to_denoiser(model: TwoTower, seed: int) -> None:
    """Start each denoiser layer equal to the context layer it reads, unconditioned."""
    denoiser, context = model.denoiser_tower, model.context_tower
    assert denoiser is not None
    for layer, source in zip(denoiser.layers, denoiser.reads, strict=True):
        layer.load_state_dict(model.values_of(f"context_tower.layers.{source}"))
    denoiser.embeddings.load_state_dict(context.embeddings.state_dict())
    denoiser.norm_f.load_state_dict(context.norm_f.state_dict())
    if (mask := denoiser.mask_embedding) is not None:  # like an average token, until it is trained
        table = model.values_of("context_tower.embeddings")["weight"]
        mask.copy_(table.mean(0, dtype=mask.dtype))
    if model.config.draft is not None:
        _start_thin(model, seed)
        return
    model.lm_head.load_state_dict(model.values_of("context_lm_head"))
    remove_conditioning(model, seed)


def _start_thin(model: TwoTower, seed: int) -> None:
    """A thin denoiser's head is rows of the context tower's; what else it has adds nothing yet."""
    if model.draft_ids is not None:
        model.lm_head.weight.copy_(model.values_of("context_lm_head")["weight"][model.draft_ids])
    denoiser = model.denoiser()
    if denoiser.hidden_proj is not None:
        denoiser.hidden_proj.weight.zero_()
    if model.bigram is not None:
        down, generator = model.bigram.down_proj.weight, torch.Generator().manual_seed(seed)
        down.copy_(torch.randn(down.shape, generator=generator))
        model.bigram.up_proj.weight.zero_()


@torch.no_grad()
def remove_conditioning(model: TwoTower, seed: int) -> None:
    """Gate 1, shift and scale 0 for every t.

    The timestep embedder is random, so that its gradient is not zero once t_block has moved.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.t_embedder.parameters():
        values = torch.randn(parameter.shape, generator=generator) * model.config.init.std
        parameter.copy_(values if parameter.ndim > 1 else torch.zeros_like(parameter))
    for parameter in model.t_block.parameters():
        nn.init.zeros_(parameter)
    for table in model.scale_shift_tables:
        table.zero_()
        table[2] = 1.0  # rows: shift, scale, gate
