"""The state of a run: what a step changes and a checkpoint holds.

On disk it is a folder: `state.json` and one file of tensors (safetensors) for each process that
wrote it, with this process's rows of what is sharded. Any number of processes reads what any number
wrote, each its own rows and no more. Nothing is pickled, so that a foreign folder runs no code;
whatever we did not write is refused in one line.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twotower.checkpoint.write import Piece, write_tensors
from twotower.config import DraftSpec, TwoTowerConfig
from twotower.families import config_from_dict, config_to_dict
from twotower.model.two_tower import TwoTower
from twotower.train.optimizer import Optimizers, WeightAverage

STATE_FILE = "state.json"
_FORMAT = 2
_MAX_BYTES = 1 << 24  # of state.json
_ADAM_KEYS, _MUON_KEYS = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}


@dataclass(kw_only=True)
class TrainState:
    """Weights, optimiser, average and position; of several processes, this one's part of it."""

    model: TwoTower
    optimizer: Optimizers
    average: WeightAverage | None = None
    step: int = 0  # optimiser steps done
    rows_read: int = 0  # position in the training order
    pending_losses: list[float] = field(default_factory=list)  # of steps since the last metrics

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While entered, the model has the weights that are evaluated and exported."""
        if self.average is None:
            yield
        else:
            with self.average.in_the_model():
                yield

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, sharded ones as they are: model.*, optimizer.*, average.*"""
        found = {f"model.{name}": value for name, value in _model_tensors(self.model).items()}
        for name, parameter, part in self._optimized():
            for key, value in part.state[parameter].items():
                found[f"optimizer.{name}.{key}"] = value
        average = {} if self.average is None else self.average.values
        return found | {f"average.{name}": value for name, value in average.items()}

    def _optimized(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for part in self.optimizer.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    yield names[id(parameter)], parameter, part


def _model_tensors(model: TwoTower) -> dict[str, Tensor]:
    """Parameters, shared ones once, and all buffers."""
    values = model.state_dict()
    kept = {name for name, _ in model.named_parameters()}
    kept |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in values.items() if name in kept}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A state on disk: `folder`, and what its state.json says."""

    folder: Path
    step: int
    rows_read: int
    rows_fingerprint: str
    config: TwoTowerConfig
    pending_losses: list[float]
    files: dict[str, int]  # bytes by name


def config_values(config: TwoTowerConfig) -> dict[str, object]:
    """JSON-able; a model's config.json does not tell of a thin denoiser."""
    draft = None if config.draft is None else dataclasses.asdict(config.draft)
    return config_to_dict(config) | ({} if draft is None else {"draft": draft})


def config_of(values: dict[str, Any]) -> TwoTowerConfig:
    """The inverse of `config_values`."""
    draft = values.pop("draft", None)
    config = config_from_dict(values)
    return config if draft is None else config.replace(draft=DraftSpec(**draft))


def write_part(folder: Path, state: TrainState, rank: int, count: int) -> None:
    """Write process `rank`'s tensors of a checkpoint into its folder."""
    pieces = []
    for name, value in state.tensors().items():
        if isinstance(value, DTensor) or rank == 0:
            own = _own_rows(value)[0]
            if own.numel():
                pieces.append(Piece(name, own, own.dtype))
    write_tensors(folder / f"tensors-{rank:05d}-of-{count:05d}.safetensors", pieces)


def write_description(folder: Path, state: TrainState, rows_fingerprint: str) -> None:
    """Write state.json, when the tensors of all processes are on the disk."""
    files = sorted(folder.glob("*.safetensors"))
    content = {
        "format": _FORMAT,
        "step": state.step,
        "rows_read": state.rows_read,
        "rows_fingerprint": rows_fingerprint,
        "config": config_values(state.model.config),
        "pending_losses": state.pending_losses,
        "files": {file.name: file.stat().st_size for file in files},
    }
    with (folder / STATE_FILE).open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_checkpoint(folder: Path) -> Checkpoint:
    """What a checkpoint says of itself; ValueError if it is not ours, or a file is cut."""
    file = folder / STATE_FILE
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{STATE_FILE} is too large")
        content = json.loads(file.read_text())
        if content.pop("format") != _FORMAT:
            raise ValueError(f"it is not of format {_FORMAT}")
        for name, size in content["files"].items():
            if Path(name).name != name or (folder / name).stat().st_size != size:
                raise ValueError(f"{name} is damaged")
        config = config_of(content.pop("config"))
        found = Checkpoint(folder=folder, config=config, **content)
        _check_types(found)
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"checkpoint: {folder} cannot be read ({_one_line(error)})") from error


def _check_types(found: Checkpoint) -> None:
    whole = (found.step, found.rows_read)
    if not all(type(number) is int and number > 0 for number in whole):
        raise ValueError(f"step and rows_read are {whole}")
    if type(found.rows_fingerprint) is not str or not found.files:
        raise ValueError("it names no rows or no files")
    if not all(type(loss) is float for loss in found.pending_losses):
        raise ValueError("pending_losses are not numbers")


def load_state(found: Checkpoint, state: TrainState) -> None:
    """Fill a fresh state from a checkpoint, however either is sharded.

    ValueError (one line) if a tensor is missing, unknown or of another shape.
    """
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(found.folder / name, framework="pt"))
                for name in sorted(found.files)
            ]
            _fill(state, _Stored(files))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {found.folder} cannot be read ({_one_line(error)}); delete it to go on "
            "from the one before"
        ) from error
    state.step, state.rows_read = found.step, found.rows_read
    state.pending_losses = [*found.pending_losses]


@torch.no_grad()
def _fill(state: TrainState, stored: "_Stored") -> None:
    for name, parameter, part in state._optimized():
        keys = stored.keys_below(f"optimizer.{name}.")
        expected = _ADAM_KEYS if isinstance(part, torch.optim.AdamW) else _MUON_KEYS
        if keys and keys != expected:  # none: no gradient has reached it
            raise ValueError(f"optimizer.{name} has {', '.join(sorted(keys))}")
        for key in keys:
            is_count = key == "step"
            like = torch.zeros((), device=parameter.device) if is_count else parameter
            part.state[parameter][key] = torch.zeros_like(like)
    wanted = state.tensors()
    for names, what in ((wanted.keys() - stored.names, "no"), (stored.names - wanted, "unknown")):
        if names:
            raise ValueError(f"it has {what} {min(names)}, of {len(names)} such tensors")
    for name, target in wanted.items():
        if stored.shape(name) != target.shape:
            raise ValueError(f"{name} has shape {[*stored.shape(name)]}, not {[*target.shape]}")
        own, start = _own_rows(target)
        values = stored.rows(name, start, len(own)) if own.dim() else stored.scalar(name)
        if values.dtype != own.dtype:
            raise ValueError(f"{name} is of {values.dtype}, not {own.dtype}")
        own.copy_(values)


def _own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What this process holds of a tensor, and the number of its first row."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    mesh = tensor.device_mesh
    chunk = -(-len(tensor) // mesh.size())  # as FSDP cuts
    return tensor.to_local().detach(), min(chunk * mesh.get_local_rank(), len(tensor))


class _Stored:
    """The tensors of a checkpoint: rows in the order of the processes that wrote them."""

    def __init__(self, files: list[Any]) -> None:
        self._pieces: dict[str, list[Any]] = {}  # views of each, in the order of rows
        for file in files:
            for name in file.keys():  # noqa: SIM118  # a safetensors file is no mapping
                self._pieces.setdefault(name, []).append(file.get_slice(name))
        self.names = self._pieces.keys()

    def keys_below(self, prefix: str) -> set[str]:
        """Last parts of the names that begin with `prefix`."""
        found = (name.removeprefix(prefix) for name in self.names if name.startswith(prefix))
        return {name for name in found if "." not in name}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of all rows together."""
        first, *more = (tuple(piece.get_shape()) for piece in self._pieces[name])
        if more and any(not shape or shape[1:] != first[1:] for shape in (first, *more)):
            raise ValueError(f"the pieces of {name} do not fit together")
        return (first[0] + sum(shape[0] for shape in more), *first[1:]) if first else ()

    def scalar(self, name: str) -> Tensor:
        """A tensor without rows."""
        (piece,) = self._pieces[name]
        value: Tensor = piece[...]
        return value

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Rows `start` to `start + count - 1` of a tensor."""
        found: list[Tensor] = []
        first = 0
        for piece in self._pieces[name]:
            length = piece.get_shape()[0]
            low, high = max(start, first) - first, min(start + count, first + length) - first
            if low < high or not found:
                found.append(piece[max(low, 0) : max(high, 0)])
            first += length
        return torch.cat(found)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
