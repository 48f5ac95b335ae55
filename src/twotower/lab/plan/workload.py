"""What is to be written: rows, lengths, and what a pass or a cycle commits."""

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["ar", "diffusion", "speculative"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`batch` rows, each reads a prompt and writes `new_tokens`; all rows are taken as equal.

    `tokens_per_cycle`: of speculation, one draft and one verification; None if it is not known.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    block_size: int
    tokens_per_nfe: float
    tokens_per_cycle: float | None = None
    draft_passes: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "new_tokens", "block_size", "draft_passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; use at least 1")
        for name in ("tokens_per_nfe", "tokens_per_cycle"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= self.block_size:
                raise ValueError(
                    f"{name}: {value} must be above 0 and at most the block's {self.block_size}"
                )
        if self.tokens_per_cycle is not None and self.tokens_per_cycle < 1:
            raise ValueError(
                f"tokens_per_cycle: {self.tokens_per_cycle} is too small; a cycle yields at least 1"
            )

    @property
    def extensions(self) -> int:
        """Blocks that the context tower reads back: all but the last, which ends the row."""
        return -(-self.new_tokens // self.block_size) - 1

    @property
    def mean_past(self) -> float:
        """Tokens in the cache half-way through the answer."""
        return self.prompt_tokens + self.new_tokens / 2
