"""The tensors of a checkpoint folder under their two-tower names, whatever its layout."""

import dataclasses
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint import names
from twotower.checkpoint.empty import Towers
from twotower.checkpoint.files import Entry, read_entries
from twotower.checkpoint.names import Layout
from twotower.config import ModelConfig

_log = logging.getLogger(__name__)


def read_layout(folder: Path) -> tuple[dict[str, Entry], Layout]:
    """The tensors under their two-tower names, and the layout they were found in."""
    found = read_entries(folder)
    layout = names.layout_of(found)
    if layout is None:
        raise ValueError(
            f"{folder}: tensors such as {next(iter(found), 'none')!r} are of another model; "
            "known are context_tower.*, backbone.* and model.*"
        )
    entries: dict[str, Entry] = {}
    for name, entry in found.items():
        if (released := names.released_name(name, layout)) is not None:
            entries[released] = entry._replace(name=name)
    return entries, layout


def with_heads(
    config: ModelConfig, entries: dict[str, Entry], towers: Towers
) -> tuple[ModelConfig, dict[str, Entry]]:
    """Complete a tied checkpoint's heads; untied if one has values of its own.

    `transformers` writes such heads: it never ties this architecture, whatever its config says.
    """
    entries = names.with_tied_heads(entries)
    for head, source in names.HEADS.items():
        needed = towers == "both" or head.startswith(names.CONTEXT_PARTS)
        if not needed or head not in entries or source not in entries:
            continue
        a, b = _read(entries[head]), _read(entries[source])
        if a.shape != b.shape or not torch.equal(a, b):
            _log.warning("config.json ties the head, but %s has values of its own: kept", head)
            return dataclasses.replace(config, tie_word_embeddings=False), entries
    return config, entries


def _read(entry: Entry) -> Tensor:
    with safe_open(entry.file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(entry.name)
    return tensor
