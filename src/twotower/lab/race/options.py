"""What a race may be asked for, validated."""

from dataclasses import dataclass
from pathlib import Path

from twotower.engine import MODES
from twotower.lab.evaluate.options import check_names, split_names
from twotower.lab.race.costs import AR
from twotower.lab.race.ours import ENGINES

SHIPPED = "shipped"
SIZES = (SHIPPED, "32M", "160M")
NUM_ITEMS = 10
OUR_MODES = ("ar", "diffusion", "speculative")


@dataclass(frozen=True, kw_only=True)
class RaceOptions:
    """Which of our modes is how fast against AR decoding by us and by others, and why."""

    sizes: str = SHIPPED
    """Models to race, separated by commas: shipped (real text), 32M and 160M (random weights that
    repeat the shipped model's commits)."""
    model: str | None = None
    """Checkpoint folder or hub id in place of the shipped model."""
    modes: str = ",".join(OUR_MODES)
    """Our modes, separated by commas; ar must be among them."""
    engines: str = ",".join(ENGINES)
    """Our engines, separated by commas."""
    rivals: bool = True
    """Also transformers and llama.cpp, where they are installed."""
    items: int | None = None
    """Held-out prompts per category: 10 when not given, 50 with --quality."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    max_prompt_tokens: int = 2048
    """Longer prompts are left out, and counted."""
    replays: int = 16
    """Answers that each random model repeats, categories taking turns."""
    repeats: int = 30
    """Timed calls of each pass."""
    seed: int = 0
    """Seed of the items, of the random weights and of the resampling."""
    allow_unsandboxed_code: bool = False
    """Run code that the model writes even where this machine has no sandbox for it."""
    out: Path | None = None
    """Folder for race.json and the pictures."""

    def __post_init__(self) -> None:
        if self.items is not None and self.items < 1:
            raise ValueError(f"items: {self.items} is too small; use at least 1")
        for name in ("max_new_tokens", "max_prompt_tokens", "replays", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; use at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative; use 0 or more")
        check_names("sizes", self.size_names, SIZES)
        check_names("modes", self.mode_names, MODES)
        check_names("engines", self.engine_names, tuple(ENGINES))
        if AR not in self.mode_names:
            raise ValueError(f"modes: {self.modes} lacks ar, which all others are compared with")

    @property
    def size_names(self) -> tuple[str, ...]:
        return split_names(self.sizes)

    @property
    def mode_names(self) -> tuple[str, ...]:
        return split_names(self.modes)

    @property
    def engine_names(self) -> tuple[str, ...]:
        return split_names(self.engines)
