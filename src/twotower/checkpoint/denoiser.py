"""A thin denoiser beside a loaded backbone: made new, saved alone, loaded again.

Its folder holds what the backbone does not have, how to put both together, and a sketch of the
backbone's weights: beside another one it would draft nonsense, and is refused.
"""

import copy
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoint import names
from twotower.checkpoint.empty import allocate, build_empty
from twotower.checkpoint.files import DTYPES, HALVES, SINGLE_FILE, read_entries, resolve
from twotower.checkpoint.write import Piece, write_checkpoint
from twotower.config import DraftSpec, TwoTowerConfig
from twotower.families import DENOISER_ALONE, read_json
from twotower.model.initialise import copy_context_to_denoiser
from twotower.model.ngrams import Ngrams
from twotower.model.thin import sketch, thin_config
from twotower.model.two_tower import TwoTower

_FEW = 8  # matrices that are read to know a backbone, where they are still in files
_MIN_ALIKE = 0.95  # of two sketches: 4-bit weights of one model have 0.99, other models 0
_SPEC = tuple(field.name for field in fields(DraftSpec))
_SIZE = (int, type(None))
_NGRAMS = "ngrams."
_MEASURED = "tokens_per_cycle"  # in config.json, where it was measured


@dataclass(frozen=True, kw_only=True)
class DenoiserRecord:
    """A denoiser alone, by its configuration and its file's header."""

    source: str
    backbone: str
    reads: tuple[int, ...]
    block_size: int
    draft: DraftSpec
    parameters: int
    ngrams: int
    num_bytes: int


def is_denoiser(folder: Path) -> bool:
    """Whether a folder holds a denoiser alone."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == DENOISER_ALONE


def describe_denoiser(folder: Path) -> DenoiserRecord:
    """What `twotower inspect` tells; ValueError (one line) for a damaged one."""
    values, entries = read_json(folder / "config.json"), read_entries(folder)
    sizes = {name: math.prod(e.shape) for name, e in entries.items() if e.dtype in DTYPES}
    sizes.pop("backbone_sketch", None)
    sizes.pop(f"{_NGRAMS}probabilities", None)
    ngrams = entries.get(f"{_NGRAMS}keys")
    try:
        return DenoiserRecord(
            source=str(folder),
            backbone=str(values["backbone"]),
            reads=tuple(values["reads"]),  # type: ignore[arg-type]  # checked here
            block_size=int(values["block_size"]),  # type: ignore[call-overload]
            draft=_draft_of(values),
            parameters=sum(sizes.values()),
            ngrams=0 if ngrams is None else math.prod(ngrams.shape),
            num_bytes=(folder / SINGLE_FILE).stat().st_size,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; restore the file") from None


def _draft_of(values: Mapping[str, object]) -> DraftSpec:
    """What a denoiser's config.json says of it; KeyError, ValueError."""
    found: dict[str, Any] = {name: values[name] for name in _SPEC}
    for name, value in found.items():
        kinds = (bool,) if name == "reads_hidden" else (int,) if name == "bigram_rank" else _SIZE
        if type(value) not in kinds:  # a bool is an int
            raise ValueError(f"{name}={reprlib.repr(value)} is of the wrong type")
    return DraftSpec(**found)


def with_new_denoiser(
    backbone: TwoTower, config: TwoTowerConfig, draft_ids: Tensor | None, seed: int
) -> TwoTower:
    """A denoiser before its first step: each layer equal to the one it reads. Float32."""
    made = _with_empty_denoiser(backbone, config, torch.float32)
    if draft_ids is not None:
        made.draft_ids = draft_ids.to(backbone.context_device)
    copy_context_to_denoiser(made, seed)
    return made.eval()


def save_denoiser(
    model: TwoTower, folder: str | Path, backbone: str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a model's thin denoiser alone. backbone: the name under which people find the other
    half. Whole or not at all; ValueError (one line) for a full disk or a folder of something else.
    """
    model.denoiser()  # ValueError where there is none
    spec = model.config.draft
    if spec is None:
        raise ValueError("this denoiser is a full tower; save both towers with save_model")
    pieces = [
        Piece(name, tensor, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in _own_tensors(model).items()
    ]
    pieces.append(Piece("backbone_sketch", sketch(model), torch.float32))
    if model.ngrams is not None:
        pieces += _ngram_pieces(model.ngrams)
    config = {
        "model_type": DENOISER_ALONE,
        "backbone": backbone,
        "backbone_hidden_size": model.config.hidden_size,
        "backbone_layers": model.config.context.num_layers,
        "reads": list(model.config.reads),
        "block_size": model.config.block_size,
        **{name: getattr(spec, name) for name in _SPEC},
    }
    if model.tokens_per_cycle is not None:
        config[_MEASURED] = round(model.tokens_per_cycle, 4)
    write_checkpoint(folder, pieces, config, None, 2**62)


def find_denoiser(backbone: TwoTowerConfig, path: str | Path) -> Path:
    """The folder of a denoiser for a backbone, which need not be loaded. ValueError (one line) for
    what is no denoiser, or one of a backbone of other sizes.
    """
    accepted = "a folder that twotower adapt has written, or a hub id owner/name"
    folder = resolve(path, field="denoiser", accepted=accepted)
    if not is_denoiser(folder):
        raise ValueError(f"denoiser: {path} is not a folder of a denoiser; give {accepted}")
    values = read_json(folder / "config.json")
    sizes = backbone.hidden_size, backbone.context.num_layers
    if sizes != (values.get("backbone_hidden_size"), values.get("backbone_layers")):
        raise ValueError(_of_another(path, values))
    return folder


def denoiser_config(backbone: TwoTowerConfig, folder: Path) -> TwoTowerConfig:
    """A backbone's configuration with the denoiser of a folder that `find_denoiser` found."""
    values = read_json(folder / "config.json")
    try:
        return thin_config(
            backbone,
            values["reads"],  # type: ignore[arg-type]  # checked there
            values["block_size"],  # type: ignore[arg-type]
            _draft_of(values),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; restore the file") from None


def _of_another(path: str | Path, values: Mapping[str, object]) -> str:
    name = values.get("backbone")
    return f"denoiser: {path} was trained for another model, {name}; give that as the model"


def load_denoiser(
    backbone: TwoTower,
    path: str | Path,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    keeps_halves: bool = False,
) -> TwoTower:
    """The backbone with the denoiser of a folder or hub id, in a dtype, the backbone's where none
    is given, and on a device, the backbone's where none is given; there both share the embeddings
    and, unless the denoiser drafts fewer tokens, the head. keeps_halves: as in `load_checkpoint`.
    ValueError (one line) for the denoiser of another backbone.
    """
    folder = find_denoiser(backbone.config, path)
    config = denoiser_config(backbone.config, folder)
    dtype = dtype or backbone.context_tower.norm_f.weight.dtype
    halves = _half_dtypes(folder) if keeps_halves else {}
    made = _with_empty_denoiser(backbone, config, dtype, device, halves)
    _fill(made, folder / SINGLE_FILE, _of_another(path, read_json(folder / "config.json")))
    if made.draft_ids is not None:
        head, own = made.values_of("context_lm_head")["weight"], made.lm_head.weight
        rows = head[made.draft_ids.to(head.device)]
        own.data = rows.to(own.device, rows.dtype if keeps_halves else dtype)
    preferred = {"mode": "speculative", "block_size": config.block_size}
    made.generation_defaults = {**backbone.generation_defaults, **preferred}
    made.tokens_per_cycle = _measured(read_json(folder / "config.json"), folder)
    return made.eval()


def _half_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of the matrices that a denoiser's file has in half precision."""
    return {
        name: DTYPES[entry.dtype]
        for name, entry in read_entries(folder).items()
        if name.endswith("_proj.weight") and entry.dtype in HALVES
    }


def _measured(values: Mapping[str, object], folder: Path) -> float | None:
    """What a denoiser's config.json tells of its drafts; ValueError (one line) for what is none."""
    told = values.get(_MEASURED)
    if told is None or (isinstance(told, int | float) and 1 <= told < math.inf):
        return None if told is None else float(told)
    raise ValueError(
        f"{folder / 'config.json'}: {_MEASURED}={reprlib.repr(told)} must be a number of at least "
        "1; restore the file"
    )


def _with_empty_denoiser(
    backbone: TwoTower,
    config: TwoTowerConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
    own: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> TwoTower:
    """The backbone's own modules beside a denoiser that has memory and no values yet; own: as in
    `allocate`.
    """
    made, device = build_empty(config, "both"), device or backbone.context_device
    made.context_tower, made.context_lm_head = backbone.context_tower, backbone.context_lm_head
    allocate(made, (dtype, dtype), (device, device), names.DENOISER_PARTS, (), own)
    if device != backbone.context_device:
        shared = backbone.context_tower.embeddings
        made.denoiser().embeddings = copy.deepcopy(shared).to(device)
        if made.lm_head is made.context_lm_head:
            made.lm_head = copy.deepcopy(made.lm_head).to(device)
    made.generation_defaults = backbone.generation_defaults
    made.unused_ids, made.unread = backbone.unused_ids, backbone.unread
    if made.draft_ids is not None:
        made.draft_ids = torch.empty_like(made.draft_ids, device=device)
    return made


def _own_tensors(model: TwoTower) -> dict[str, Tensor]:
    """What a denoiser's file holds: all of it but what it shares with the context tower."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name == "draft_ids"
        or (name.startswith(("denoiser_tower.", "bigram.")) and ".embeddings." not in name)
    }


def _fill(model: TwoTower, file: Path, complaint: str) -> None:
    """Copy a file's tensors into the denoiser; ValueError for what does not fit."""
    wanted = _own_tensors(model)
    found = {name: entry.read() for name, entry in read_entries(file.parent).items()}
    known, own = found.pop("backbone_sketch", None), sketch(model, _FEW)
    if known is None or known.shape != own.shape or not _are_alike(known, own):
        raise ValueError(complaint)
    ngrams = [found.pop(f"{_NGRAMS}{name}", None) for name in Ngrams._fields]
    if any(tensor is not None for tensor in ngrams):
        model.ngrams = _read_ngrams(ngrams, model.config.vocab_size, file)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
        raise ValueError(f"{file}: the tensors do not fit its config.json; fetch both again")
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{file}: {name} holds NaN or infinite values; fetch it again")
        wanted[name].copy_(tensor)
    ids = model.draft_ids
    if ids is not None and not (int(ids.min()) >= 0 and int(ids.max()) < model.config.vocab_size):
        raise ValueError(f"{file}: draft_ids leave the vocabulary; fetch it again")


def _ngram_pieces(ngrams: Ngrams) -> list[Piece]:
    """n-grams as tensors; keys as int32 of the same bits, which every reader of the format has."""
    arrays = ngrams._replace(keys=ngrams.keys.view(np.int32))._asdict()
    kinds = {"probabilities": torch.float16}
    return [
        Piece(f"{_NGRAMS}{name}", torch.from_numpy(array), kinds.get(name, torch.int32))
        for name, array in arrays.items()
    ]


def _read_ngrams(tensors: Sequence[Tensor | None], vocab_size: int, file: Path) -> Ngrams:
    """The inverse of `_ngram_pieces`; ValueError (one line) for what is none."""
    try:
        keys, tokens, probabilities = (t.numpy() for t in tensors)  # type: ignore[union-attr]
        ngrams = Ngrams(keys.view(np.uint32), tokens, probabilities.astype(np.float32))
        is_ascending = np.diff(ngrams.keys.astype(np.int64)) > 0
        is_token = (tokens >= 0) & (tokens < vocab_size)
        is_probability = (ngrams.probabilities >= 0) & (ngrams.probabilities <= 1)
        if len(keys) > 0 and is_ascending.all() and (is_token & is_probability).all():
            return ngrams
    except (AttributeError, TypeError, ValueError):
        pass
    raise ValueError(f"{file}: its n-grams are damaged; fetch it again")


def _are_alike(one: Tensor, two: Tensor) -> bool:
    """Whether the sketches are of one model, by the matrices that both know."""
    known = (one != 0).any(1) & (two != 0).any(1)
    return bool(known.any()) and float((one * two).sum(1)[known].median()) >= _MIN_ALIKE
