"""What the denoiser is trained on: which blocks, how they are masked, what the loss weighs."""

from dataclasses import dataclass
from typing import Literal, get_args

ConditionOn = Literal["t", "masked-fraction", "nothing"]
TPer = Literal["row", "block"]
LossWeight = Literal["plain", "elbo"]
Targets = Literal["all", "completion"]


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

    def __post_init__(self) -> None:
        for name in ("draft_share", "first_given_share", "shift_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share; use 0 to 1")
        if self.blocks_per_row is not None and self.blocks_per_row < 1:
            raise ValueError(f"blocks_per_row: {self.blocks_per_row} is too small; use at least 1")
        for name, choices in _CHOICES.items():
            given = getattr(self, name)
            if given not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise ValueError(f"{name}: {given!r} is not one of {allowed}")


_CHOICES = {
    "targets": Targets,
    "t_per": TPer,
    "condition_on": ConditionOn,
    "loss_weight": LossWeight,
}
