"""What `adapt` may be told, and where its files lie."""

from collections.abc import Sized
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from twotower.arguments import ABOVE_ZERO, COUNT, INDEX, SHARE, check_fields, number
from twotower.config import DraftSpec

_OF_ANY = ("denoiser", "block_size")  # options that a denoiser which is trained on takes too
# Beyond these a size takes memory and gives nothing.
_AT_ONCE = number(1, 1024, is_whole=True)
_THIN_CHECKS = {
    "layers": COUNT,
    "block_size": number(2, 64, is_whole=True),
    "draft_vocab": INDEX,
    "bigram_rank": number(0, 1024, is_whole=True),
}


@dataclass(frozen=True, kw_only=True)
class ThinOptions:
    """The denoiser's shape, or the denoiser that has it."""

    denoiser: str | None = None
    """Folder or hub id of an earlier denoiser of this model: its training goes on, in its shape."""
    layers: int | None = None
    """Number of the denoiser's layers: copies of backbone layers at even distances, the last one
    among them. Default: 3, or all that have attention where those are fewer."""
    block_size: int | None = None
    """Tokens per draft: the newest token and the masked ones after it. Default: 8, or that of
    --denoiser."""
    draft_vocab: int = 8192
    """Vocabulary size of drafts: the most frequent tokens of the answers. 0: all tokens."""
    reads_hidden: bool = True
    """Add the backbone's output at the newest token to the input of the draft."""
    bigram_rank: int = 64
    """Rank of a bigram term, which lets each drafted token depend on the one before. 0: none."""

    def __post_init__(self) -> None:
        check_fields(self, _THIN_CHECKS)
        for field in fields(ThinOptions):
            is_given = getattr(self, field.name) != field.default
            if self.denoiser is not None and is_given and field.name not in _OF_ANY:
                raise ValueError(
                    f"{field.name}: has no effect with denoiser=..., whose shape is kept; leave it "
                    "out"
                )

    @property
    def own_block_size(self) -> int:
        """Of a new denoiser."""
        return self.block_size or 8

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

    max_new_tokens: int = 320
    """Maximum number of new tokens per answer."""
    temperature: float = 0.0
    """Sampling temperature of the answers; 0 is greedy. Use the temperature at which the model will
    decode."""
    batch_size: int = 32  # as in EngineOptions, whose help it has
    max_prompt_tokens: int = 1024
    """Leave out prompts with more tokens than this."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("max_new_tokens", "max_prompt_tokens"), COUNT)
        check_fields(self, {**counts, "batch_size": _AT_ONCE, "temperature": number(0)})


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Steps of training."""

    answers_per_step: int = 4
    """Answers per training step."""
    blocks_per_answer: int = 32
    """Blocks per answer and step, which begin at random tokens."""
    learning_rate: float = 1e-3
    """Peak learning rate: a linear warm-up, then a cosine decay to the end of the time."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the layers' matrices and AdamW for the rest."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly from 0 to its peak."""
    loss_decay: float = 3.0
    """Weight of the k-th masked token in the loss: exp(-(k - 1) / decay). A drafted token is of use
    only if all before it are accepted."""
    soft_targets: float = 0.5
    """Weight of distillation: cross-entropy with the backbone's probabilities. The rest of the loss
    is cross-entropy with the token that it chose."""
    weight_decay: float = 0.01
    """Weight decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradient clipping: maximum norm."""
    seed: int = 0
    """Seed of the held-out split, of new weights and of the order of answers and blocks."""

    def __post_init__(self) -> None:
        check_fields(self, _STEP_CHECKS)

    @property
    def blocks(self) -> int:
        """Of a step."""
        return self.answers_per_step * self.blocks_per_answer


_STEP_CHECKS = {
    **dict.fromkeys(("answers_per_step", "blocks_per_answer"), _AT_ONCE),
    **dict.fromkeys(("warmup_steps", "seed"), INDEX),
    **dict.fromkeys(("learning_rate", "loss_decay", "max_grad_norm"), ABOVE_ZERO),
    "weight_decay": number(0),
    "soft_targets": SHARE,
}


class WorkFolder:
    """Where a run keeps what it has done so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = path / "source.json"  # what wrote the answers, and how
        self.answers = path / "answers.jsonl"  # one a line
        self.features = path / "features"  # a folder of parts
        self.checkpoint = path / "training.safetensors"  # the newest state of training
        self.curve = path / "curve.jsonl"  # what was measured while it trained, an object a line
        self.spent = path / "spent.json"  # seconds that the stage answers has had
