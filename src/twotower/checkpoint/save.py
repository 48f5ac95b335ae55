"""A model in the released two-tower layout, or its context tower as a backbone.

Decides names, dtypes and config.json; how they get onto the disk is `write`'s business.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from twotower.checkpoint import names
from twotower.checkpoint.quantize import quantization_entry
from twotower.checkpoint.write import MAX_SHARD_BYTES, Piece, write_checkpoint
from twotower.families import config_to_dict, family_of
from twotower.model.precision import has_mapped_experts, scheme_of
from twotower.model.two_tower import TwoTower


def save_two_towers(
    model: TwoTower,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write both towers in the released layout; dtype None keeps each tensor's.

    Routers are written in float32, quantised weights as they are. extra_files: further files by
    name, e.g. a tokenizer's. ValueError (one line) if the disk is full or the folder holds
    something else than a checkpoint.
    """
    if model.denoiser_tower is None:
        raise ValueError("this model has no denoiser tower; save it with save_backbone")
    if model.config.draft is not None:
        raise ValueError(
            "a thin denoiser is not saved with its model; it stays in a folder of its own, for "
            "denoiser=DIR beside the model (checkpoint.denoiser.save_denoiser writes one)"
        )
    pieces = list(released_pieces(model, dtype))
    config = _released_config(model, dtype, family_of(model.config).TWO_TOWER_ARCHITECTURE)
    write_checkpoint(path, pieces, config, extra_files, max_shard_bytes)


def save_backbone(
    model: TwoTower,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the context tower as a single-tower backbone; the rest as in `save_two_towers`."""
    config = _released_config(model, dtype, family_of(model.config).ARCHITECTURE)
    write_checkpoint(path, backbone_pieces(model, dtype), config, extra_files)


def released_pieces(model: TwoTower, dtype: torch.dtype | None) -> Iterator[Piece]:
    """Every tensor under its released name; tied heads too, because not every reader ties them."""
    model.require_read("saving")
    if has_mapped_experts(model):
        raise ValueError("saving needs the experts in memory; load with expert_storage='memory'")
    tensors = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, slot in names.released_slots(shapes).items():
        tensor = tensors[slot.parameter]
        tensor = tensor if slot.expert is None else tensor[slot.expert]
        kept = tensor.dtype if names.split_part(name)[1] else dtype or tensor.dtype
        kept = torch.float32 if names.is_router(name) else kept
        yield Piece(name, tensor, kept)


def backbone_pieces(model: TwoTower, dtype: torch.dtype | None) -> list[Piece]:
    """The context tower and its head under their backbone names."""
    family, is_tied = family_of(model.config), model.config.tie_word_embeddings
    return [
        piece._replace(name=family.from_tower_name(names.inner_name(piece.name)))
        for piece in released_pieces(model, dtype)
        if names.is_in_backbone(piece.name, family, is_tied)
    ]


def _released_config(
    model: TwoTower, dtype: torch.dtype | None, architecture: str
) -> dict[str, object]:
    named = {"architectures": [architecture], "torch_dtype": main_dtype(model, dtype)}
    return config_to_dict(model.config) | named | quantization_entry(scheme_of(model))


def main_dtype(model: TwoTower, dtype: torch.dtype | None) -> str:
    """The dtype that config.json states: the one asked for, or the embeddings'."""
    return str(dtype or model.context_tower.embeddings.weight.dtype).removeprefix("torch.")
