"""What `adapt` may be told, and where its files lie."""

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from twotower.config import DraftSpec

Stage = Literal["answers", "train", "measure"]
STAGES: tuple[Stage, ...] = get_args(Stage)
# Of a budget: the backbone writes and its features are kept; the rest is training, but for the end.
_ANSWERS, _MEASURE = 0.4, 0.05


@dataclass(frozen=True, kw_only=True)
class ThinOptions:
    """The denoiser's shape."""

    layers: int | None = None
    """Blocks of the backbone that the denoiser copies and reads, at even distances, the last one
    among them. Default: 3, or all that have attention where those are fewer."""
    block_size: int = 8
    """Tokens of a draft: the newest one and those that are guessed behind it."""
    draft_vocab: int = 8192
    """Tokens that it can draft: the most frequent of the answers. 0: all."""
    reads_hidden: bool = True
    """Add the backbone's output before the block to the block's input."""
    bigram_rank: int = 64
    """Rank of what the token before adds to the logits of the next. 0: nothing."""

    def __post_init__(self) -> None:
        lowest = {"layers": 1, "block_size": 2, "draft_vocab": 0, "bigram_rank": 0}
        for name, least in lowest.items():
            if (value := getattr(self, name)) is not None:
                _check_least(name, value, least)

    def draft_of(self, draft_ids: Sized | None) -> DraftSpec:
        """What the configuration keeps of it, for a draft vocabulary; None: the whole one."""
        return DraftSpec(
            vocab_size=None if draft_ids is None else len(draft_ids),
            reads_hidden=self.reads_hidden,
            bigram_rank=self.bigram_rank,
        )


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """The backbone's own answers."""

    max_tokens: int = 320
    """Most new tokens of an answer."""
    temperature: float = 0.0
    """Of sampling; 0 is greedy, which is what greedy decoding is drafted for."""
    rows: int = 32
    """Answers written at the same time."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "rows", "max_prompt_tokens"):
            _check_least(name, getattr(self, name), 1)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Steps of training."""

    answers_per_step: int = 4
    """Answers of which a step takes blocks."""
    blocks_per_answer: int = 32
    """Blocks of each, which begin at random tokens."""
    learning_rate: float = 1e-3
    """The largest: it rises over `warmup_steps` and falls as a cosine over the budget."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the layers' matrices and AdamW for the rest."""
    warmup_steps: int = 100
    """Steps until the learning rate is at its largest."""
    loss_decay: float = 3.0
    """The k-th guessed token weighs exp(-(k - 1) / decay): it counts only if all before are
    right."""
    soft_targets: float = 0.5
    """Share of the loss that is scored on the backbone's probabilities; the rest counts only the
    token that it chose."""
    weight_decay: float = 0.01
    """Of matrices."""
    clip: float = 1.0
    """Largest norm of a gradient."""
    seed: int = 0
    """Of everything that is drawn."""

    def __post_init__(self) -> None:
        for name in ("answers_per_step", "blocks_per_answer"):
            _check_least(name, getattr(self, name), 1)
        if not 0 <= self.soft_targets <= 1:
            raise ValueError(f"soft_targets={self.soft_targets} must be from 0 to 1")
        for name in ("learning_rate", "loss_decay", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0")

    @property
    def blocks(self) -> int:
        """Of a step."""
        return self.answers_per_step * self.blocks_per_answer


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many seconds each stage of a run may take."""

    minutes: float
    overhead_s: float = 0.0
    """Of all that is no stage: loading, the estimate."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < 1e6:
            raise ValueError(f"minutes={self.minutes} must be a number above 0")

    def seconds(self, stage: Stage) -> float:
        """Of one stage."""
        share = {"answers": _ANSWERS, "measure": _MEASURE}.get(stage, 1 - _ANSWERS - _MEASURE)
        return max(0.0, 60 * self.minutes - self.overhead_s) * share


@dataclass(frozen=True)
class WorkFolder:
    """Where a run keeps what it has done so far."""

    path: Path

    @property
    def source(self) -> Path:
        """What wrote the answers, and how."""
        return self.path / "source.json"

    @property
    def answers(self) -> Path:
        """One answer a line."""
        return self.path / "answers.jsonl"

    @property
    def features(self) -> Path:
        """A folder of parts."""
        return self.path / "features"

    @property
    def checkpoint(self) -> Path:
        """The newest state of training."""
        return self.path / "training.safetensors"

    @property
    def curve(self) -> Path:
        """What was measured while it trained, one object a line."""
        return self.path / "curve.jsonl"

    @property
    def spent(self) -> Path:
        """Seconds that each stage has had."""
        return self.path / "spent.json"


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
