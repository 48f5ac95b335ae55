"""What a training run is asked for: fields, defaults, help texts, and their TOML form.

The fields stand in groups by concern, so that a function names the group it reads; the command line
derives its flags and the sections of its help from them.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

from twotower.arguments import nearest
from twotower.documented import public_options
from twotower.train.checks import checked

Recipe = Literal["backbone", "denoiser"]
# What the training of a thin denoiser, an earlier or a new one, takes of the options of denoisers.
_OF_THIN = ("loss_decay", "backend", "quantization")
_OF_ANY = ("targets", "denoised_blocks_per_row", "unaligned_row_fraction", *_OF_THIN)
_TAKEN = {
    "denoiser": (*_OF_ANY, "denoiser"),
    "reads": (*_OF_ANY, "reads", "block_size", "bigram_rank"),
}


@dataclass(frozen=True, kw_only=True)
class CheckedOptions:
    """Options whose values are converted to their fields' types and checked."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = checked(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CheckedOptions):
    """The size of a new backbone."""

    preset: str | None = None
    """Size of a new backbone: tiny, small or moe. Default: small."""
    config: Path | None = None
    """config.json of a new backbone, instead of a preset; vocabulary and special tokens are the
    data's."""


@dataclass(frozen=True, kw_only=True)
class DenoiserOptions(CheckedOptions):
    """Which parts of a two-tower model are trained; for the denoiser recipe alone."""

    block_size: int | None = None
    """Tokens per block. Default: the model's own, 16 of a new one."""
    towers: Literal["two", "tied", "tied-ar"] = "two"
    """two: a denoiser beside the context tower. tied: both towers share one set of weights, trained
    through both uses, with two heads. tied-ar: tied, and the context head learns the next token."""
    train_context: bool = False
    """Train the context tower too, through the keys, values and states that the denoiser reads."""
    bidirectional_mamba: bool = False
    """The denoiser's Mamba layers average a forward and a backward scan of the block. The choice is
    saved in config.json and holds for all later runs from it."""
    denoiser_init: Literal["context", "scratch"] = "context"
    """context: start from a copy of the context tower, or from the denoiser of a two-tower
    checkpoint. scratch: from random weights."""
    reads: tuple[int, ...] | None = None
    """Train a thin denoiser, which only drafts: the context layers that its layers start from and
    read, by number, such as 0 9 11. Each block is drafted from its first token and masks alone."""
    denoiser: str | None = None
    """Folder or hub id of a thin denoiser of this model: its training goes on, in its shape."""
    bigram_rank: int = 64
    """With --reads: rank of a bigram term, which lets each drafted token depend on the one before.
    0: none."""
    loss_decay: float = 8.0
    """Of a thin denoiser: weight of the k-th masked token in the loss: exp(-(k - 1) / decay). A
    drafted token is of use only if all before it are accepted."""
    backend: Literal["auto", "native", "eager"] = "auto"
    """Of a thin denoiser: what runs the frozen context tower. native: C++ on a CPU, compiled on
    first use. eager: PyTorch. auto: native if it can run the model, else eager."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Of a thin denoiser: what the model will be served with; it learns from context states of
    weights that are quantised so. Native passes alone have int8 and int4."""

    @property
    def is_tied(self) -> bool:
        """Whether one set of weights is both towers."""
        return self.towers != "two"


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(CheckedOptions):
    """The optimizer."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of the layers and AdamW for the rest."""
    accumulate: int = 1
    """Gradient accumulation: forward and backward passes per optimizer step, each of batch_size
    rows."""
    weight_decay: float = 0.1
    """Weight decay of matrices; never of embeddings, norms, biases, A_log, D, dt_bias and the adaLN
    tables."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: float = 1.0
    """Gradient clipping: maximum norm. 0 is off."""
    load_balance_rate: float = 1e-3
    """Auxiliary-loss-free load balancing: how far a step moves a router's bias towards experts with
    few tokens. 0 is off; softmax routers have none."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999, which evaluation and
    export then use. 0 is off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(CheckedOptions):
    """The learning rate: linear warm-up, constant, decay (WSD)."""

    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly from 0 to its peak."""
    decay_fraction: float = 0.2
    """Fraction of the steps, at the end, in which the learning rate falls linearly. 0: none."""
    final_lr_ratio: float = 0.0
    """Last learning rate as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True)
class DiffusionObjectiveOptions(CheckedOptions):
    """Which tokens are masked and how the loss is weighted; for the denoiser recipe alone."""

    targets: Literal["all", "completion"] = "all"
    """Tokens that are masked and learnt: all, or only completions (with their EOS)."""
    mask_rate_per: Literal["row", "block"] = "row"
    """Draw the masking rate t, uniform in [0.001, 1], once a row, as in the paper, or for each
    block."""
    denoised_blocks_per_row: int | None = None
    """Number of blocks per row that are masked and denoised, drawn anew in every step. Blocks with
    a target come first; if there are fewer, they repeat with other masks. Default: every block
    once."""
    fully_masked_fraction: float = 0.0
    """Fraction of the blocks that are masked entirely (t = 1), as in the first pass of decoding."""
    first_token_visible_fraction: float = 0.0
    """Fraction of the blocks whose first token is never masked: in speculative decoding the context
    tower has chosen it already."""
    unaligned_row_fraction: float = 0.0
    """Fraction of the rows of aligned data (twotower prepare --align) that start at any token, as
    blocks do in speculative decoding."""
    condition_on: Literal["t", "masked-fraction", "none"] = "t"
    """Input of the time conditioning. t: the masking rate that was drawn. masked-fraction: the
    fraction of the block that is masked, as in decoding. none: no time conditioning."""
    loss_weight: Literal["plain", "elbo"] = "plain"
    """plain: mean cross-entropy of the masked tokens. elbo: each weighted by 1/t, the diffusion
    bound."""
    ar_loss_weight: float | None = None
    """Weight of the context tower's next-token loss beside the denoiser's, with train_context or
    towers=tied-ar. Default: 1 with tied-ar, else 0."""
    early_block_size: int | None = None
    """Block size of the first steps (early_fraction), before block_size; the paper has 32, then
    16."""
    early_fraction: float = 0.5
    """Fraction of the steps that have early_block_size."""


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(CheckedOptions):
    """Precision, memory and processes."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of matrix products (autocast); weights, gradients and optimizer state stay
    float32."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    compile: bool = False
    """Compile model and loss with torch.compile: a slow start, then faster steps."""
    activation_checkpointing: bool = False
    """Recompute the layers in the backward pass instead of keeping their activations: less memory,
    about a third more time."""
    peer_timeout_s: int = 600
    """Under torchrun: seconds of silence after which a process counts as lost."""


@dataclass(frozen=True, kw_only=True)
class LoggingOptions(CheckedOptions):
    """Checkpoints, evaluation and logs."""

    resume: bool = True
    """Continue from the newest checkpoint of the run folder. If off, the folder must be new."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of metrics, whose loss is the mean since the line before."""
    eval_every: int = 200
    """Steps between measurements of the loss on held-out rows. 0 is off."""
    eval_rows: int = 64
    """Held-out rows per measurement."""
    tensorboard: bool = True
    """Also write a TensorBoard log, if the library is installed."""


@public_options
@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    ModelOptions,
    DenoiserOptions,
    DiffusionObjectiveOptions,
    OptimizationOptions,
    ScheduleOptions,
    ComputeOptions,
    LoggingOptions,
):
    """One training run. The same command again continues a run that was stopped."""

    recipe: Recipe
    """backbone: next-token training of the context tower. denoiser: masked-diffusion training of
    the denoiser tower beside the frozen context tower that `init` names."""
    data: Path = Path("data/corpus")
    """Token shard that twotower prepare made."""
    init: Path | None = None
    """Checkpoint folder to start from; a denoiser needs a backbone or a two-tower model."""
    output: Path | None = None
    """Run folder: options, versions, metrics, checkpoints and the exported model. Default:
    runs/backbone or runs/denoiser."""
    steps: int = 4000
    """Optimizer steps in all, those of earlier runs of the folder included."""
    batch_size: int = 16
    """Rows (sequences) per forward and backward pass, of all processes together."""
    sequence_length: int = 256
    """Tokens per row; for the denoiser a multiple of block_size."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of initial weights, order of rows and noise."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("init", "preset", "config") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[0]}: given together with {given[1]}=...; only one can name the model"
            )
        if self.activation_checkpointing and self.compile:
            raise ValueError("activation_checkpointing: not together with compile; leave one out")
        if self.recipe == "backbone":
            self._refuse_denoiser_options()
        elif self.init is None:
            raise ValueError(
                "init: missing; the denoiser recipe needs the checkpoint folder of a trained "
                "backbone"
            )
        for name, needed in (("final_lr_ratio", "decay_fraction"), ("eval_rows", "eval_every")):
            is_given = getattr(self, name) != getattr(TrainOptions, name)
            if is_given and getattr(self, needed) == 0:
                raise ValueError(f"{name}: no effect with {needed}=0; leave it out")
        self._check_early_blocks()
        self._check_towers()
        self._check_thin()

    def _refuse_denoiser_options(self) -> None:
        groups = (DenoiserOptions, DiffusionObjectiveOptions)
        for field in itertools.chain.from_iterable(map(dataclasses.fields, groups)):
            if getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name}: no effect with recipe=backbone; leave it out")

    def _check_early_blocks(self) -> None:
        if (
            self.early_block_size is None
            and self.early_fraction != DiffusionObjectiveOptions.early_fraction
        ):
            raise ValueError("early_fraction: no effect without early_block_size; give both")
        if self.early_block_size is not None and self.early_block_size == self.block_size:
            raise ValueError(
                f"early_block_size: {self.early_block_size} is block_size itself; leave it out"
            )

    def _check_towers(self) -> None:
        if self.is_tied and self.train_context:
            raise ValueError(
                f"train_context: no effect with towers={self.towers}, which trains the one tower "
                "that there is; leave it out"
            )
        if self.is_tied and self.denoiser_init == "scratch":
            raise ValueError(
                f"denoiser_init: scratch would lose the tower that towers={self.towers} shares; "
                "use context"
            )
        if self.ar_loss_weight and not (self.train_context or self.towers == "tied-ar"):
            raise ValueError(
                "ar_loss_weight: no effect on a frozen context; add train_context or towers=tied-ar"
            )

    def _check_thin(self) -> None:
        """Options of thin denoisers and of full ones have no effect on each other."""
        given = next((name for name in _TAKEN if getattr(self, name) is not None), None)
        groups = (DenoiserOptions, DiffusionObjectiveOptions)
        for field in itertools.chain.from_iterable(map(dataclasses.fields, groups)):
            if getattr(self, field.name) == field.default:
                continue
            if given is None and field.name in ("bigram_rank", *_OF_THIN):
                raise ValueError(f"{field.name}: no effect without reads=...; leave it out")
            if given is not None and field.name not in _TAKEN[given]:
                raise ValueError(f"{field.name}: no effect with {given}=...; leave it out")

    @property
    def run_folder(self) -> Path:
        return Path("runs") / self.recipe if self.output is None else self.output

    @property
    def next_token_weight(self) -> float:
        """What the context tower's next-token loss weighs beside the denoiser's."""
        default = 1.0 if self.towers == "tied-ar" else 0.0
        return default if self.ar_loss_weight is None else self.ar_loss_weight

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.sequence_length

    def to_dict(self) -> dict[str, object]:
        """JSON-able values by field name, which the class takes again."""
        values = dataclasses.asdict(self)
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def check_values(values: Mapping[str, object]) -> None:
    """ValueError for names that are no fields, with the nearest, and for values a field refuses."""
    hints = get_type_hints(TrainOptions)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{name}: no such option{nearest(name, hints)}; see twotower train -h")
        checked(name, value, hints[name])
