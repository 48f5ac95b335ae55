"""A model's shape: towers as sizes plus a list of layers.

Knows no file: how a family spells it in config.json is that family's business (`families/`).
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

from twotower.arguments import require
from twotower.specs import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_SIZE,
    AttentionSpec,
    LayerSpec,
    MambaSpec,
    MoESpec,
    RopeSpec,
    S,
    check_positive,
    check_sizes,
)


@dataclass(frozen=True, kw_only=True)
class InitSpec:
    """How fresh weights are drawn; a trained model never reads it."""

    std: float = 0.02
    rescale_residual: bool = True
    """Matrices whose output is added to the residual are divided by the root of their number."""
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("std", "time_step_min", "time_step_max"):
            check_positive(name, getattr(self, name))
        if not math.isfinite(self.time_step_floor):
            raise ValueError(f"time_step_floor={self.time_step_floor} must be a finite number")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Sizes of one tower and its layers in order.

    Raises ValueError (one line) for a value that is out of range.
    """

    hidden_size: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float = 1e-5
    residual_in_fp32: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "hidden_size", "vocab_size")
        check_positive("norm_eps", self.norm_eps)
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ValueError(
                f"the number of layers is {len(self.layers)}; it must be between 1 and {MAX_LAYERS}"
            )
        experts = sum(layer.num_experts for layer in self.layers_of(MoESpec))
        if experts > MAX_EXPERTS:
            raise ValueError(
                f"all layers together have {experts} routed experts; at most {MAX_EXPERTS} are "
                "allowed"
            )
        turned = {(a.rope, a.head_dim) for a in self.layers_of(AttentionSpec) if a.rope is not None}
        if len(turned) > 1:
            raise ValueError("attention layers with different rotary positions are not supported")
        if not turned and any(a.window is not None for a in self.layers_of(AttentionSpec)):
            raise ValueError("a window of attention is not supported without rotary positions")

    @cached_property
    def num_layers(self) -> int:
        """How many residual layers."""
        return len(self.layers)

    @property
    def pattern(self) -> str:
        """One symbol a layer: M Mamba-2, * attention, E experts, - dense MLP."""
        return "".join(layer.symbol for layer in self.layers)

    @property
    def rotary(self) -> tuple[RopeSpec, int] | None:
        """The rotary positions of the layers that have any, and their head size."""
        attention = self.layers_of(AttentionSpec)
        return next(((a.rope, a.head_dim) for a in attention if a.rope is not None), None)

    @property
    def kv_elements(self) -> int:
        """Numbers that one token adds to the KV cache, over all attention layers."""
        return sum(2 * a.num_kv_heads * a.head_dim for a in self.layers_of(AttentionSpec))

    @property
    def conv_elements(self) -> int:
        """Numbers of one row's convolution states, over all Mamba layers."""
        return sum(m.conv_channels * (m.conv_width - 1) for m in self.layers_of(MambaSpec))

    @property
    def ssm_elements(self) -> int:
        """Numbers of one row's SSM states, over all Mamba layers."""
        return sum(m.width * m.state_size for m in self.layers_of(MambaSpec))

    def layers_of(self, kind: type[S]) -> list[S]:
        """The layers of a kind, in order."""
        return [layer for layer in self.layers if isinstance(layer, kind)]

    def shared_spec(self, kind: type[S]) -> S | None:
        """What all layers of a kind have in common; None if there are none.

        ValueError (one line) if they differ, for callers that need one size for all.
        """
        found = set(self.layers_of(kind))
        if len(found) > 1:
            raise ValueError(f"{kind.label} layers of different sizes are not supported here")
        return found.pop() if found else None


@dataclass(frozen=True, kw_only=True)
class DraftSpec:
    """What a thin denoiser has where a full tower has embeddings, a head and time conditioning.

    It shares the context tower's embeddings and rows of its head, both frozen, and writes all
    masked tokens of a block in one pass.
    """

    vocab_size: int | None = None
    """Tokens that it can draft, the most frequent of its training; None: all."""
    reads_hidden: bool = True
    """Whether the context tower's output before a block is added to the block's input."""
    bigram_rank: int = 0
    """Rank of what the token before adds to the logits; 0: tokens of a block are independent."""

    def __post_init__(self) -> None:
        if self.vocab_size is not None:
            check_sizes(self, "vocab_size")
        if not 0 <= self.bigram_rank <= MAX_SIZE:
            raise ValueError(f"bigram_rank={self.bigram_rank} must be between 0 and {MAX_SIZE}")


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """A context tower, a denoiser tower that reads its layers, and the tokens they agree on.

    reads[j]: the context layer whose state layer j of the denoiser reads. ValueError (one line)
    where a denoiser layer cannot read that state, or a token id is outside the vocabulary.
    """

    family: str
    """The model_type under which config.json is read and written."""
    context: TowerConfig
    denoiser: TowerConfig
    reads: tuple[int, ...]
    tie_word_embeddings: bool = False
    init: InitSpec = dataclasses.field(default_factory=InitSpec)
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    """Every id that ends a text."""
    pad_token_id: int | None = 0
    mask_token_id: int = 3
    block_size: int = 16
    bidirectional_mamba: bool = False
    """Of the denoiser; the context tower is always causal."""
    draft: DraftSpec | None = None
    """Of a thin denoiser; None: the denoiser has embeddings, head and time conditioning."""

    def __post_init__(self) -> None:
        require("context", self.context, TowerConfig, "TowerConfig(...)")
        require("denoiser", self.denoiser, TowerConfig, "TowerConfig(...)")
        check_sizes(self, "block_size")
        self._check_reads()
        self._check_ids()

    @classmethod
    def full(cls, family: str, tower: TowerConfig, **values: object) -> "TwoTowerConfig":
        """A denoiser as deep as the context tower: layer j reads layer j."""
        reads = tuple(range(tower.num_layers))
        return cls(family=family, context=tower, denoiser=tower, reads=reads, **values)  # type: ignore[arg-type]

    @cached_property
    def hidden_size(self) -> int:
        """Width of both towers."""
        return self.context.hidden_size

    @cached_property
    def vocab_size(self) -> int:
        """Tokens of both heads."""
        return self.context.vocab_size

    @property
    def draft_vocab_size(self) -> int:
        """Tokens of the denoiser's head."""
        return (self.draft and self.draft.vocab_size) or self.vocab_size

    @property
    def has_own_mask(self) -> bool:
        """Whether the mask is no token of the vocabulary, but an embedding of the denoiser."""
        return self.mask_token_id == self.vocab_size

    @property
    def num_mask_embeddings(self) -> int:
        """Embeddings of an own mask: one for each position of a block where no layer of the
        denoiser knows an order, else one.
        """
        ordered = self.denoiser.rotary is not None or self.denoiser.layers_of(MambaSpec)
        return 1 if ordered else self.block_size

    def replace(self, **values: object) -> "TwoTowerConfig":
        """A copy with other values, checked again."""
        return dataclasses.replace(self, **values)  # type: ignore[arg-type]  # checked there

    def _check_reads(self) -> None:
        depth, layers = self.context.num_layers, self.denoiser.layers
        if len(self.reads) != len(layers):
            raise ValueError(
                f"reads has {len(self.reads)} entries for {len(layers)} denoiser layers; give one "
                "context layer for each"
            )
        if any(not 0 <= index < depth for index in self.reads):
            raise ValueError(f"reads={list(self.reads)} must lie between 0 and {depth - 1}")
        for index, (source, layer) in enumerate(zip(self.reads, layers, strict=True)):
            if not _can_read(layer, self.context.layers[source]):
                raise ValueError(
                    f"denoiser layer {index} ({layer.label}) cannot read the state of context "
                    f"layer {source} ({self.context.layers[source].label}); choose a layer of the "
                    "same kind and sizes"
                )

        if self.draft is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft vocab_size={self.draft_vocab_size} must be at most {self.vocab_size}"
            )
        if self.draft is not None and not self.has_own_mask:
            raise ValueError(
                f"mask_token_id={self.mask_token_id}: a thin denoiser has a mask of its own, "
                f"{self.vocab_size}"
            )

    def _check_ids(self) -> None:
        ids: list[tuple[str, int | None]] = [
            (name, getattr(self, name))
            for name in ("mask_token_id", "bos_token_id", "pad_token_id")
        ]
        for name, value in [*ids, *(("eos_token_id", eos) for eos in self.eos_token_ids)]:
            # One past the last is a mask with an embedding that the denoiser alone has.
            limit = self.vocab_size + (name == "mask_token_id")
            if value is not None and not 0 <= value < limit:
                raise ValueError(
                    f"{name}={value} is outside the vocabulary; allowed are 0 to "
                    f"{self.vocab_size - 1}"
                )


def _can_read(layer: LayerSpec, source: LayerSpec) -> bool:
    """Whether a denoiser layer can start from the state that a context layer leaves."""
    return _state_shape(layer) in ((), _state_shape(source))


def _state_shape(spec: LayerSpec) -> tuple[str | int, ...]:
    """What two layers must share for one to read the other's state; MLPs and experts have none."""
    if isinstance(spec, AttentionSpec):
        return spec.symbol, spec.num_kv_heads, spec.head_dim, spec.rope is not None
    if isinstance(spec, MambaSpec):
        return (
            spec.symbol, spec.num_heads, spec.head_dim, spec.state_size, spec.num_groups,
            spec.conv_width,
        )  # fmt: skip
    return ()
