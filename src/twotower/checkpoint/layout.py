"""The tensors of a checkpoint folder under their two-tower names, whatever its layout."""

import logging
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint import names
from twotower.checkpoint.empty import Towers
from twotower.checkpoint.files import Entry, read_entries
from twotower.config import TwoTowerConfig
from twotower.families import family_of

_log = logging.getLogger(__name__)


def read_layout(folder: Path, config: TwoTowerConfig) -> tuple[dict[str, Entry], str]:
    """The tensors under their two-tower names, and the layout they were found in."""
    found, family = read_entries(folder), family_of(config)
    layout = names.layout_of(found, family)
    if layout is None:
        known = ", ".join(f"{prefix}*" for prefix in ("context_tower.", *family.LAYOUTS))
        raise ValueError(
            f"{folder}: tensors such as {next(iter(found), 'none')!r} are of another model; "
            f"known are {known}"
        )
    entries: dict[str, Entry] = {}
    for name, entry in found.items():
        if (released := names.released_name(name, layout, family)) is not None:
            entries[released] = entry._replace(name=name)
    return entries, layout


def with_heads(
    config: TwoTowerConfig, entries: dict[str, Entry], towers: Towers
) -> tuple[TwoTowerConfig, dict[str, Entry]]:
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
            return config.replace(tie_word_embeddings=False), entries
    return config, entries


def _read(entry: Entry) -> Tensor:
    with safe_open(entry.file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(entry.name)
    return tensor
