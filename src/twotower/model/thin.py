"""A thin denoiser beside a backbone: a few layers that read a few of the context tower's."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import DraftSpec, TowerConfig, TwoTowerConfig
from twotower.layers.quantised import QuantisedLinear
from twotower.model.two_tower import TwoTower
from twotower.specs import AttentionSpec, MambaSpec, MoESpec

_SKETCHED = 16  # numbers of each matrix


def blocks_of(tower: TowerConfig) -> list[tuple[int, ...]]:
    """A tower's layers by blocks: one with a state, and those behind it that have none."""
    found: list[tuple[int, ...]] = []
    for index, layer in enumerate(tower.layers):
        if isinstance(layer, AttentionSpec | MambaSpec) or not found:
            found.append((index,))
        else:
            found[-1] = (*found[-1], index)
    return found


def thin_blocks(tower: TowerConfig) -> list[tuple[int, ...]]:
    """The blocks that a thin denoiser is made of where nobody names its layers: attention, and the
    MLPs behind it. A Mamba state is too large to be kept for every token of the answers; with the
    experts of a layer a denoiser would not be thin.
    """
    return [
        tuple(index for index in block if not isinstance(tower.layers[index], MoESpec))
        for block in blocks_of(tower)
        if isinstance(tower.layers[block[0]], AttentionSpec)
    ]


def spread(blocks: Sequence[tuple[int, ...]], count: int) -> list[int]:
    """The layers of `count` blocks at even distances, the last one among them: of 30 blocks those
    numbered 9, 19, 29.
    """
    chosen = [blocks[(number + 1) * len(blocks) // count - 1] for number in range(count)]
    return [layer for block in chosen for layer in block]


def thin_config(
    config: TwoTowerConfig, reads: Sequence[int], block_size: int, draft: DraftSpec
) -> TwoTowerConfig:
    """A backbone's configuration with a denoiser whose layer j is, and reads, layer reads[j].
    ValueError (one line) for layers that it does not have.
    """
    last = config.context.num_layers - 1
    if not reads or not all(0 <= index <= last for index in reads):
        raise ValueError(f"reads={list(reads)} must be layers of the model, 0 to {last}")
    layers = tuple(config.context.layers[index] for index in reads)
    return config.replace(
        denoiser=replace(config.context, layers=layers),
        reads=tuple(reads),
        block_size=block_size,
        mask_token_id=config.vocab_size,
        draft=draft,
    )


def trained_parameters(model: TwoTower) -> dict[str, nn.Parameter]:
    """What training of a thin denoiser moves, and only that requires a gradient: the denoiser
    without what it shares with the context tower.
    """
    model.requires_grad_(False)
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("denoiser_tower.", "bigram.")) and ".embeddings." not in name
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def set_block_size(model: TwoTower, block_size: int) -> None:
    """Let a thin denoiser draft blocks of another size: of masks for each position the last ones
    are left out, or the last goes on.
    """
    model.config = model.config.replace(block_size=block_size)
    model.generation_defaults = {**model.generation_defaults, "block_size": block_size}
    masks = model.denoiser().mask_embedding
    assert masks is not None
    if masks.dim() == 2:
        positions = torch.arange(block_size, device=masks.device)
        model.denoiser().mask_embedding = nn.Parameter(masks[positions.clamp(max=len(masks) - 1)])


def sketch(model: TwoTower, most_read: float = math.inf) -> Tensor:
    """A few numbers of every matrix of the context tower: (matrices, 16) float32, each row of
    length 1, zeros where the numbers are packed, and beyond the first `most_read` matrices that are
    still in files. Rounding to 4 bits turns it by little.
    """
    rows = []
    for name, module in model.context_tower.layers.named_modules(prefix="context_tower.layers"):
        if isinstance(module, nn.Linear):
            is_unread = f"{name}.weight" in model.unread
            is_known = not is_unread or most_read > 0
            weight = model.values_of(name)["weight"] if is_known else torch.zeros(0)
            most_read -= is_unread
            own = weight.detach().flatten()[:_SKETCHED].float().cpu()
            rows.append(F.pad(own, (0, _SKETCHED - len(own))))
        elif isinstance(module, QuantisedLinear):
            rows.append(Tensor([0.0] * _SKETCHED))
    return F.normalize(torch.stack(rows), dim=1)
