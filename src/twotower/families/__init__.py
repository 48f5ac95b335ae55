"""Families of models by `model_type`: how files spell a configuration and its tensors.

A new family is one module with the names of `Family`, and one entry here.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path

from twotower.config import TwoTowerConfig
from twotower.families import llama, nemotron_h
from twotower.families.family import Family
from twotower.families.fields import read_json
from twotower.paths import usable_path

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Family",
    "config_from_dict",
    "config_to_dict",
    "family_of",
    "read_config",
    "read_json",
]

DENOISER_ALONE = "twotower_denoiser"  # the model_type of what stands beside a backbone
_KNOWN: tuple[Family, ...] = (nemotron_h, *llama.FAMILIES)
FAMILIES: dict[str, Family] = {family.MODEL_TYPE: family for family in _KNOWN}
PRESETS: dict[str, Mapping[str, object]] = {"nano-30b": nemotron_h.NANO_30B}
"""config.json of models that are known by name."""


def config_from_dict(values: Mapping[str, object]) -> TwoTowerConfig:
    """The configuration in a config.json's content; ValueError (one line) if it cannot be read."""
    model_type = values.get("model_type", nemotron_h.MODEL_TYPE if _is_hybrid(values) else None)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if model_type == DENOISER_ALONE:
        raise ValueError(
            "config.json: is of a denoiser alone; give this folder as the denoiser and its "
            f"backbone, {values.get('backbone')!r}, as the model"
        )
    if family is None:
        shown = (
            "is missing" if model_type is None else f"{reprlib.repr(model_type)} is not supported"
        )
        raise ValueError(f"config.json: model_type {shown}; supported are {', '.join(FAMILIES)}")
    return family.read_config(values)


def config_to_dict(config: TwoTowerConfig) -> dict[str, object]:
    """The inverse of `config_from_dict`."""
    return {"model_type": config.family, **family_of(config).write_config(config)}


def family_of(config: TwoTowerConfig) -> Family:
    """The module that knows how this model's files are written."""
    return FAMILIES[config.family]


def read_config(path: str | Path) -> TwoTowerConfig:
    """Read a config.json, or the folder that holds it; ValueError (one line) names the file."""
    path = usable_path("path", path)
    file = path / "config.json" if path.is_dir() else path
    if (path / "adapter_config.json").is_file() and not file.is_file():
        raise ValueError(f"{path}: holds an adapter alone; merge it into its base model first")
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a checkpoint folder holds a config.json")
    values = read_json(file)
    try:
        return config_from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).removeprefix('config.json: ')}") from None


def _is_hybrid(values: Mapping[str, object]) -> bool:
    """Whether a file without model_type is one of the released ones, which need none."""
    return "hybrid_override_pattern" in values or "layers_block_type" in values
