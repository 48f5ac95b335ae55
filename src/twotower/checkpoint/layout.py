"""The tensors of a checkpoint folder under their two-tower names, whatever its layout."""

import logging
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.checkpoint import names
from twotower.checkpoint.empty import Towers, build_empty
from twotower.checkpoint.files import Entry, read_entries
from twotower.checkpoint.gguf_reader import INDEX_FILE as GGUF_INDEX
from twotower.checkpoint.gguf_reader import gguf_names
from twotower.config import TwoTowerConfig
from twotower.families import Family, family_of
from twotower.kernels.quantised import Blocks

_log = logging.getLogger(__name__)


def read_layout(folder: Path, config: TwoTowerConfig) -> tuple[dict[str, Entry], str]:
    """The tensors under their two-tower names, and the layout they were found in."""
    found, family = read_entries(folder), family_of(config)
    if (folder / GGUF_INDEX).is_file():
        return _from_gguf(config, found), "gguf"
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
            entries |= _halves(released, entry) or {released: entry}
    has_head = config.tie_word_embeddings or any(n.startswith("context_lm_head.") for n in entries)
    if layout == names.BARE and not has_head:
        raise ValueError(
            f"{folder}: has no lm_head.weight, and config.json ties no head to the embeddings: a "
            "model without a head writes no text; save it as its class for causal language models"
        )
    return entries, layout


def _halves(name: str, entry: Entry) -> dict[str, Entry]:
    """Both parts of a tensor (E, 2F, D) that is two, as `transformers` keeps gated experts; none
    for any other.
    """
    found = names.halves(name)
    if not found or len(entry.shape) != 3 or entry.shape[1] % 2:
        return {}
    experts, rows, width = entry.shape
    half = entry._replace(shape=(experts, rows // 2, width))
    return {
        part: half._replace(load=partial(_load_half, entry, index))
        for index, part in enumerate(found)
    }


def _load_half(entry: Entry, index: int) -> Tensor:
    with safe_open(entry.file, framework="pt") as shard:
        rows = entry.shape[1] // 2
        half: Tensor = shard.get_slice(entry.name)[:, index * rows : (index + 1) * rows]
    return half


def with_heads(
    config: TwoTowerConfig, entries: dict[str, Entry], towers: Towers
) -> tuple[TwoTowerConfig, dict[str, Entry]]:
    """Complete a tied checkpoint's heads; untied if one has values of its own.

    `transformers` writes such heads: it never ties this architecture, whatever its config says.
    """
    entries = names.with_tied_heads(entries)
    for head, source in names.HEADS.items():
        needed = towers == "both" or head.startswith(names.CONTEXT_PARTS)
        is_own = head in entries and entries[head] is not entries.get(source)
        if not needed or not is_own or source not in entries:
            continue
        a, b = entries[head].read(), entries[source].read()
        if a.shape != b.shape or not torch.equal(a, b):
            _log.warning("config.json ties the head, but %s has values of its own: kept", head)
            return config.replace(tie_word_embeddings=False), entries
    return config, entries


def _from_gguf(config: TwoTowerConfig, found: dict[str, Entry]) -> dict[str, Entry]:
    """A GGUF file's tensors under their two-tower names; unknown ones keep theirs."""
    family, left = family_of(config), dict(found)
    table = gguf_names(config)
    entries: dict[str, Entry] = {}
    for name, tensor in build_empty(config, "context").state_dict().items():
        inner, shape = names.inner_name(name), tuple(tensor.shape)
        known, written = table(inner), family.gguf_shape(inner, shape, config)
        for released, slot in names.released_slots({name: shape}).items():
            is_one = slot.expert is None
            entry = left.pop(str(known) if is_one else f"{known}[{slot.expert}]", None)
            if entry is None:
                continue
            own = slot.shape if is_one and entry.shape == written else entry.shape
            load = partial(_load_gguf, entry, family, inner, config, own)
            is_same = entry.blocks is not None and own == entry.shape
            blocks = partial(_gguf_blocks, entry, family, inner, config) if is_same else None
            entries[released] = entry._replace(load=load, shape=own, blocks=blocks)
    return entries | left


def _load_gguf(
    entry: Entry, family: Family, name: str, config: TwoTowerConfig, shape: tuple[int, ...]
) -> Tensor:
    return family.values_from_gguf(name, entry.read().reshape(shape), config)


def _gguf_blocks(entry: Entry, family: Family, name: str, config: TwoTowerConfig) -> Blocks:
    """Families change the order of a matrix's rows alone, and a row's bytes go where it goes."""
    assert entry.blocks is not None
    found = entry.blocks()
    return found._replace(data=family.values_from_gguf(name, found.data, config))
