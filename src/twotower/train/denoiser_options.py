"""What the denoiser is and what it is trained on: its towers, its blocks, their masks, the loss."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

ConditionOn = Literal["t", "masked-fraction", "nothing"]
TPer = Literal["row", "block"]
LossWeight = Literal["plain", "elbo"]
Targets = Literal["all", "completion"]
Towers = Literal["two", "tied", "tied-ar"]
DenoiserInit = Literal["context", "scratch"]
DEFAULT_EARLY_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class DenoiserOptions:
    """Fields that only the denoiser recipe reads."""

    targets: Targets = "all"
    """Tokens that are masked and learnt: all, or only the completions (with their EOS)."""
    blocks_per_row: int | None = None
    """Blocks of each row to denoise, drawn anew for every row: those with a target first, and
    again with other noise when they are fewer. By default every block once."""
    t_per: TPer = "row"
    """Draw the masking probability t for each row, as the paper does, or for each block."""
    draft_share: float = 0.0
    """Share of the blocks with t = 1: fully masked, as every first pass is."""
    first_given_share: float = 0.0
    """Share of the blocks whose first token is never masked, as in self-speculation."""
    shift_share: float = 0.0
    """Share of the rows whose block boundaries are moved against an aligned shard's, because
    self-speculation starts blocks anywhere."""
    condition_on: ConditionOn = "t"
    """What the time conditioning is told: t, the masked fraction of each block (as in generation),
    or nothing."""
    loss_weight: LossWeight = "plain"
    """plain: the mean over masked tokens. elbo: each weighted by 1/t, the diffusion bound."""
    early_block_size: int | None = None
    """Tokens per block in the first steps, as the paper's 32 before 16."""
    early_share: float = DEFAULT_EARLY_SHARE
    """Share of the steps with early_block_size."""
    towers: Towers = "two"
    """two: a denoiser beside the context tower. tied: one set of weights is both towers, trained
    through both uses, with two heads. tied-ar: the context head learns the next token too."""
    train_context: bool = False
    """Train the context tower too, through the keys, values and states that the denoiser reads."""
    ar_loss_weight: float = 0.0
    """Weight of the context tower's next-token loss beside the denoiser's, for train_context;
    tied-ar takes 1 when it is not given."""
    bidirectional_mamba: bool = False
    """The denoiser's Mamba layers give the mean of the scan and of one from the block's end. Kept
    in config.json; a model that already has it keeps it."""
    denoiser_init: DenoiserInit = "context"
    """context: from a backbone, a copy of the context tower; from a two-tower checkpoint, its own
    denoiser goes on. scratch: random weights in either case."""

    def __post_init__(self) -> None:
        for name in ("draft_share", "first_given_share", "shift_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share; use 0 to 1")
        if self.blocks_per_row is not None and self.blocks_per_row < 1:
            raise ValueError(f"blocks_per_row: {self.blocks_per_row} is too small; use at least 1")
        if not 0.0 <= self.ar_loss_weight < math.inf:
            raise ValueError(f"ar_loss_weight: {self.ar_loss_weight} is no weight; use 0 or more")
        self._check_early_blocks()
        for name, choices in _CHOICES.items():
            given = getattr(self, name)
            if given not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise ValueError(f"{name}: {given!r} is not one of {allowed}")
        self._check_towers()

    def _check_early_blocks(self) -> None:
        if not 0.0 < self.early_share < 1.0:
            raise ValueError(f"early_share: {self.early_share} must lie between 0 and 1, as 0.5")
        if self.early_block_size is None and self.early_share != DEFAULT_EARLY_SHARE:
            raise ValueError("early_share: no effect without early_block_size; give both")
        if self.early_block_size is not None and self.early_block_size < 1:
            raise ValueError(
                f"early_block_size: {self.early_block_size} is too small; use at least 1"
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
        if self.ar_loss_weight > 0.0 and not (self.train_context or self.towers == "tied-ar"):
            raise ValueError(
                "ar_loss_weight: no effect on a frozen context; add train_context or towers=tied-ar"
            )

    @property
    def is_tied(self) -> bool:
        """Whether one set of weights is both towers."""
        return self.towers != "two"

    @property
    def next_token_weight(self) -> float:
        """What the context tower's next-token loss weighs beside the denoiser's."""
        if self.towers == "tied-ar":
            return self.ar_loss_weight or 1.0
        return self.ar_loss_weight


_CHOICES = {
    "targets": Targets,
    "t_per": TPer,
    "condition_on": ConditionOn,
    "loss_weight": LossWeight,
    "towers": Towers,
    "denoiser_init": DenoiserInit,
}
