"""Everything a training run can be told, validated, and read from TOML.

The only place where defaults and help texts of training are written; the command line derives its
flags from these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from twotower.train.denoiser_options import DenoiserOptions

Recipe = Literal["backbone", "denoiser"]
DecayShape = Literal["linear", "sqrt"]
OptimizerName = Literal["adamw", "muon"]
Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DenoiserOptions):
    """One training run. The same command again continues a run that was stopped."""

    recipe: Recipe
    """backbone: next-token training of the context tower. denoiser: masked-diffusion training of
    the denoiser tower beside the frozen context tower that --init names."""
    data: Path = Path("data/corpus")
    """Token shard made by 'twotower prepare'."""
    out: Path | None = None
    """Run folder: options, versions, metrics, checkpoints and the exported model. By default
    runs/backbone or runs/denoiser."""
    init: Path | None = None
    """Checkpoint folder to start from; a denoiser needs a backbone or a two-tower model."""
    preset: str | None = None
    """Size of a new backbone: tiny, small (the default) or moe."""
    config: Path | None = None
    """config.json of a new backbone, instead of a preset; its vocab_size gives way to the
    data's.
    """
    block_size: int | None = None
    """Tokens per block for the denoiser; by default the model's own (16)."""

    sequence_length: int = 256
    """Tokens per row; a multiple of the block size for the denoiser."""
    batch_size: int = 16
    """Rows per forward and backward pass."""
    accumulate: int = 1
    """Passes per optimiser step: rows per step are batch_size times this."""
    steps: int = 4000
    """Optimiser steps in all. A longer run may continue a shorter one."""
    optimizer: OptimizerName = "adamw"
    """adamw, or muon: Muon for the layers' matrices and AdamW for the rest."""
    learning_rate: float = 3e-3
    """Peak of the schedule."""
    warmup: int = 100
    """Steps of linear rise from 0 to the peak."""
    decay: float = 0.2
    """Share of the steps, at the end, in which the rate falls; 0 keeps it constant."""
    decay_shape: DecayShape = "linear"
    """How it falls: linear, or sqrt (fast first, then slow)."""
    final_lr_ratio: float = 0.0
    """Last learning rate as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW decay of matrices; never of norms, biases, A_log, D, dt_bias and the adaLN tables."""
    decay_embeddings: bool = False
    """Apply the weight decay to the embeddings too."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moment decay rates."""
    grad_clip: float = 1.0
    """Largest gradient norm; larger ones are scaled down. 0 switches it off."""
    expert_balance: float = 1e-3
    """How far a step moves the bias of a mixture-of-experts router towards experts with few tokens;
    0 leaves it alone. Models without such layers have none."""
    ema: float = 0.0
    """Decay of a moving average of the trained weights, as 0.999, which evaluation and export then
    use; 0 switches it off."""

    seed: int = 0
    """Decides initial weights, order of rows and noise; step k's randomness depends on it and k
    only.
    """
    dtype: Precision = "bfloat16"
    """Autocast precision; weights and optimiser stay float32. float32 switches autocast off."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1 ..."""
    threads: int | None = None
    """CPU threads; PyTorch's choice when not given."""
    compile: bool = False
    """Compile the model and loss with torch.compile: a slow start, then faster steps."""
    recompute: bool = False
    """Keep only the inputs of the layers' mixers and compute the rest again in the backward pass:
    less memory, about a third more time."""
    peer_timeout_s: int = 600
    """Under torchrun: seconds until a process that does not answer is given up."""

    resume: bool = True
    """Continue from the newest checkpoint of the run folder. With --no-resume the folder must be
    new.
    """
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    log_every: int = 10
    """Steps between metric lines; their loss is the mean since the last one."""
    eval_every: int = 200
    """Steps between measurements of the loss on held-out rows; 0 switches them off."""
    eval_rows: int = 64
    """Held-out rows per measurement."""
    tensorboard: bool = True
    """Also write a TensorBoard log, if the library is installed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, lowest in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not (value >= lowest and math.isfinite(value)):
                raise ValueError(f"{name}: {value} is too small; use {lowest} or more")
        for name in ("decay", "final_lr_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share; use 0 to 1")
        if not (self.learning_rate > 0.0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: {self.learning_rate} must be above 0; try 0.003")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema: {self.ema} must be at least 0 and below 1; try 0.999")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas: {self.betas} must both be at least 0 and below 1")
        for name in ("recipe", "optimizer", "decay_shape", "dtype"):
            allowed = get_args(_type_of(name))
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise ValueError(f"{name}: {given!r} is not one of {', '.join(allowed)}")
        if self.recompute and self.compile:
            raise ValueError("recompute: not together with compile; leave one out")
        self._check_model_source()
        if self.early_block_size is not None and self.early_block_size == self.block_size:
            raise ValueError(
                f"early_block_size: {self.early_block_size} is block_size itself; leave it out"
            )

    def _check_model_source(self) -> None:
        given = [name for name in ("init", "preset", "config") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[0]}: given together with {given[1]}; only one can name the model"
            )
        if self.recipe == "denoiser" and self.init is None:
            raise ValueError(
                "init: missing; the denoiser recipe needs the checkpoint folder of a trained "
                "backbone"
            )
        if self.recipe == "backbone":
            fields = [field for field in dataclasses.fields(DenoiserOptions)]
            without_effect = [f.name for f in fields if getattr(self, f.name) != f.default]
            for name in [*without_effect, *["block_size"] * (self.block_size is not None)]:
                raise ValueError(f"{name}: no effect with recipe backbone; leave it out")

    @property
    def run_folder(self) -> Path:
        return Path("runs") / self.recipe if self.out is None else self.out

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulate

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.sequence_length

    def to_dict(self) -> dict[str, object]:
        """JSON-able values by field name; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TrainOptions:
        """Options from plain values (TOML, JSON). Unknown names and wrong types raise
        ValueError.
        """
        converted = cls.check_values(values)
        if "recipe" not in converted:
            raise ValueError("recipe: missing; use backbone or denoiser")
        return cls(**converted)  # type: ignore[arg-type]  # checked by check_values

    @classmethod
    def check_values(cls, values: Mapping[str, object]) -> dict[str, object]:
        """Plain values as the fields' types, some fields only; ValueError as in `from_dict`."""
        hints = get_type_hints(cls)
        for name in values:
            if name not in hints:
                raise ValueError(_unknown_name(name, list(hints)))
        return {name: _convert(name, value, hints[name]) for name, value in values.items()}


_AT_LEAST: dict[str, float] = {
    "block_size": 1,
    "sequence_length": 2,
    "batch_size": 1,
    "accumulate": 1,
    "steps": 1,
    "warmup": 0,
    "weight_decay": 0,
    "grad_clip": 0,
    "expert_balance": 0,
    "seed": 0,
    "threads": 1,
    "peer_timeout_s": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "log_every": 1,
    "eval_every": 0,
    "eval_rows": 1,
}


def read_toml(file: Path) -> dict[str, object]:
    """Field values from a TOML file, names as in TrainOptions (dashes are accepted)."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"options: cannot read {file} ({error.strerror}); check the path"
        ) from error
    except ValueError as error:
        raise ValueError(f"options: {file} is not TOML ({error}); correct it") from error
    return {name.replace("-", "_"): value for name, value in content.items()}


def _type_of(name: str) -> object:
    return get_type_hints(TrainOptions)[name]


def _unknown_name(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"{name}: no such option; the nearest is {near[0]}"


def _convert(name: str, value: object, hint: object) -> object:
    """A plain value as the type the field wants; ValueError if it is of another kind."""
    if get_origin(hint) is Literal:
        return value  # checked against its choices by TrainOptions
    alternatives = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in alternatives:
        return None
    if Path in alternatives and isinstance(value, str):
        return Path(value)
    if get_origin(hint) is tuple:
        return _convert_pair(name, value)
    if float in alternatives and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]  # int or float, as just tested
    if type(value) in alternatives:
        return value
    kinds = " or ".join(getattr(kind, "__name__", str(kind)) for kind in alternatives)
    raise ValueError(f"{name}: {value!r} is of type {type(value).__name__}; use {kinds}")


def _convert_pair(name: str, value: object) -> tuple[float, float]:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        first, second = value
        if isinstance(first, (int, float)) and isinstance(second, (int, float)):
            return float(first), float(second)
    raise ValueError(f"{name}: {value!r} is not a pair of numbers; write [0.9, 0.95]")
