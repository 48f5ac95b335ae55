"""What an evaluation may be asked for, validated."""

from dataclasses import dataclass
from pathlib import Path

from twotower.engine.options import MODES, FirstToken
from twotower.lab.corpus import CATEGORIES


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Quality and speed of a checkpoint, task by task, every mode on the same held-out prompts."""

    model: str | None = None
    """Checkpoint folder or hub id; the shipped model when not given."""
    modes: str = "ar,diffusion,speculative"
    """Modes to compare, separated by commas; retention is measured against ar."""
    categories: str = ",".join(CATEGORIES)
    """Categories of the suite, separated by commas."""
    items: int = 200
    """Held-out prompts per category."""
    seed: int = 0
    """Seed of the items and of the resampling."""
    batch_size: int = 1
    """Prompts decoded together; speed is that of the batch."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    confidence_threshold: float | None = None
    """diffusion: instead of the checkpoint's own."""
    steps_per_block: int | None = None
    """Most denoiser passes per block, instead of the checkpoint's own."""
    first_token: FirstToken | None = None
    """diffusion: who chooses a block's first token, instead of the checkpoint's own; denoiser is as
    published."""
    verify_threshold: float | None = None
    """diffusion: instead of the checkpoint's own; 0 is as published, without verification."""
    sweep: bool = False
    """Also measure diffusion at other thresholds and pass limits, on a quarter of the items."""
    likelihood: bool = False
    """Also how probable the reference answers are: exactly by ar, by a bound under the denoiser."""
    allow_unsandboxed_code: bool = False
    """Run code that the model writes even where this machine has no sandbox for it."""
    out: Path | None = None
    """Folder for results.json, report.html and its pictures."""
    json: bool = False
    """One JSON object on stdout instead of tables."""

    def __post_init__(self) -> None:
        for name in ("items", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; use at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative; use 0 or more")
        check_names("modes", self.mode_names, MODES)
        check_names("categories", self.category_names, CATEGORIES)

    @property
    def mode_names(self) -> tuple[str, ...]:
        return split_names(self.modes)

    @property
    def category_names(self) -> tuple[str, ...]:
        return split_names(self.categories)


def split_names(text: str) -> tuple[str, ...]:
    """The names of a comma-separated list, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def check_names(field: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    """ValueError (one line) unless some names are given and all are known."""
    if not given:
        raise ValueError(f"{field}: none given; use some of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise ValueError(f"{field}: {name!r} is unknown; use some of {', '.join(known)}")
