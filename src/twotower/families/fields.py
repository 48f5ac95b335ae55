"""config.json as typed values: what every family's reader shares.

A table names a spec's fields as the file does, so that errors speak the file's language.
"""

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from twotower.config import TowerConfig, TwoTowerConfig

T = TypeVar("T")
Values = Mapping[str, object]
_MAX_BYTES = 2**28  # of a JSON file: an index of a large checkpoint has some megabytes
_SINGLE_IDS = ("bos_token_id", "pad_token_id")


def read_json(file: Path) -> dict[str, object]:
    """A file's JSON object; ValueError (one line) for anything else."""
    try:
        if (size := file.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"{size} bytes; at most {_MAX_BYTES} are read")
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); restore the file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); restore the file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object; restore the file")
    return values


def with_synonyms(values: Values, synonyms: Mapping[str, str]) -> dict[str, object]:
    """The same values under their first names; ValueError where two spellings contradict."""
    found = {name: value for name, value in values.items() if value is not None}
    for other, name in synonyms.items():
        if other not in found:
            continue
        if found.setdefault(name, found[other]) != found[other]:
            raise ValueError(
                f"config.json: {name}={reprlib.repr(found[name])} contradicts "
                f"{other}={reprlib.repr(found[other])}; keep the one that is right"
            )
    return found


def required_fields(make: Callable[..., object], names: Mapping[str, str]) -> list[str]:
    """The file's names of a spec's fields that have no default."""
    known = {field.name: field for field in fields(make)}  # type: ignore[arg-type]  # a dataclass
    return [name for field, name in names.items() if known[field].default is MISSING]


def read_spec(
    make: Callable[..., T], values: Values, names: Mapping[str, str], **given: object
) -> T:
    """A spec dataclass from a file's values; names: the file's name of each of its fields.

    ValueError (one line, in the file's names) for a missing, mistyped or impossible value.
    """
    require(values, required_fields(make, names))
    kinds = {field.name: field.type for field in fields(make)}  # type: ignore[arg-type]  # a dataclass
    found = {
        field: typed(name, values[name], kinds[field])
        for field, name in names.items()
        if values.get(name) is not None
    }
    return _in_file_names(lambda: make(**found, **given), names)


def write_spec(spec: object, names: Mapping[str, str]) -> dict[str, object]:
    """The inverse of `read_spec`; what is None is left out."""
    found = {name: getattr(spec, field) for field, name in names.items()}
    return {name: value for name, value in found.items() if value is not None}


_OWN = ("tie_word_embeddings", "mask_token_id", "block_size", "bidirectional_mamba")


def read_two_towers(
    family: str, tower: TowerConfig, values: Values, **given: object
) -> TwoTowerConfig:
    """A context tower with what config.json says beside it: special ids, block, denoiser.

    reads: the context layers that the denoiser's layers read, all where the file does not say.
    """
    kinds = TwoTowerConfig.__annotations__
    own: dict[str, Any] = {
        name: typed(name, values[name], kinds[name])
        for name in _OWN
        if values.get(name) is not None
    }
    own |= {**_token_ids(values), **given}
    reads = _reads(values.get("reads"), tower.num_layers)
    layers = tuple(tower.layers[index] for index in reads)
    make = partial(
        TwoTowerConfig,
        family=family,
        context=tower,
        denoiser=replace(tower, layers=layers),
        reads=reads,
        **own,
    )
    return _in_file_names(make, {})


def write_two_towers(config: TwoTowerConfig) -> dict[str, object]:
    """The inverse of `read_two_towers`, without the tower; ValueError for a denoiser of its own."""
    if config.denoiser.layers != tuple(config.context.layers[index] for index in config.reads):
        raise ValueError(
            "a denoiser whose layers differ from those that it reads has no file format"
        )
    found = {name: getattr(config, name) for name in (*_SINGLE_IDS, *_OWN)}
    is_full = config.reads == tuple(range(config.context.num_layers))
    found |= {} if is_full else {"reads": list(config.reads)}
    ends = list(config.eos_token_ids)
    return found | {"eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}


def _reads(value: object, num_layers: int) -> tuple[int, ...]:
    """The denoiser's layers by the context layers they read; all of them for null."""
    if value is None:
        return tuple(range(num_layers))
    is_list = isinstance(value, list) and len(value) > 0
    if is_list and all(type(index) is int and 0 <= index < num_layers for index in value):  # type: ignore[attr-defined]  # a list
        return tuple(value)  # type: ignore[arg-type]
    raise ValueError(
        f"config.json: reads={reprlib.repr(value)} must be a list of layers of the context tower, "
        f"0 to {num_layers - 1}"
    )


def _in_file_names(make: Callable[[], T], names: Mapping[str, str]) -> T:
    """make(), with errors about our fields worded in the file's names."""
    try:
        return make()
    except ValueError as error:
        text = re.sub(r"\b[a-z_]+(?==)", lambda m: names.get(m[0], m[0]), str(error))
        raise ValueError(f"config.json: {text}") from None


def require(values: Values, names: list[str]) -> None:
    """ValueError that names every field that is missing."""
    if missing := [name for name in names if values.get(name) is None]:
        raise ValueError(
            f"config.json: missing field {', '.join(missing)}; add it with the model's value"
        )


def typed(name: str, value: object, kind: Any) -> object:
    """A JSON value of the wanted type; whole numbers pass as floats."""
    kind = {"int | None": int}.get(str(kind), kind)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise ValueError(
            f"config.json: {name}={reprlib.repr(value)} must be of type {kind.__name__}"
        )
    return value


def _token_ids(values: Values) -> dict[str, object]:
    """The special ids that the file gives, null where it says so, and all ids that end a text."""
    found: dict[str, object] = {}
    for name in (*_SINGLE_IDS, "eos_token_id"):
        if name not in values:
            continue
        value = values[name]
        several = name == "eos_token_id" and isinstance(value, list)
        ids = value if several and isinstance(value, list) else [value]
        if any(type(one) is not int and (several or one is not None) for one in ids):
            raise ValueError(
                f"config.json: {name}={reprlib.repr(value)} must be a token id or null"
            )
        ends = tuple(one for one in ids if one is not None)
        found |= {name: value} if name in _SINGLE_IDS else {"eos_token_ids": ends}
    return found


def refuse(values: Values, supported: Mapping[str, object]) -> None:
    """ValueError for a field that changes the model and has another value than the supported."""
    for name, allowed in supported.items():
        value = values.get(name)
        if value is not None and value != allowed:
            raise ValueError(
                f"config.json: {name}={reprlib.repr(value)} is not supported; "
                f"only {json.dumps(allowed)}"
            )


def refuse_per_layer(values: Values, num_layers: int, known: tuple[str, ...]) -> None:
    """ValueError for sizes of single layers that a reader would pass over in silence."""
    for name, value in values.items():
        is_list = isinstance(value, list) and len(value) == num_layers > 3
        if name not in known and (is_list or name in ("block_configs", "per_layer_config")):
            raise ValueError(
                f"config.json: {name} gives each layer its own values, which is not supported; "
                "only models whose layers of a kind are alike"
            )
