"""A model's shape: towers as sizes plus a list of layers.

Knows no file: how a family spells it in config.json is that family's business (`families/`).
"""

import dataclasses
import math
import reprlib
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

# Far above every model, so that a typing error, or a file that lies, stays an error message.
MAX_SIZE = 2**24  # of any dimension
MAX_LAYERS = 2**10
MAX_EXPERTS = 2**17  # of all layers together


@dataclass(frozen=True, kw_only=True)
class MambaSpec:
    """A Mamba-2 layer: H heads of P channels, G groups of N states, W taps of convolution."""

    symbol: ClassVar[str] = "M"
    label: ClassVar[str] = "Mamba-2"
    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_width: int
    conv_bias: bool = True
    proj_bias: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, "num_heads", "head_dim", "state_size", "num_groups", "conv_width")
        _check_division(self, "num_heads", "num_groups")

    @property
    def width(self) -> int:
        """Channels of x: H * P."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: C = H * P + 2 * G * N."""
        return self.width + 2 * self.num_groups * self.state_size

    @property
    def conv_elements(self) -> int:
        """Numbers of one row's convolution state: C * (W - 1)."""
        return self.conv_channels * (self.conv_width - 1)

    @property
    def ssm_elements(self) -> int:
        """Numbers of one row's SSM state: H * P * N."""
        return self.width * self.state_size


RopeScaling = Literal["none", "linear", "llama3"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions: frequencies theta^(-2i/A), and how a scaling stretches them.

    linear: all are divided by `factor`. llama3: those whose wavelength is above
    original_max_positions / low_freq_factor are, those below original_max_positions /
    high_freq_factor are not, and between them the change is gradual.
    """

    theta: float
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            _check_positive(name, getattr(self, name))
        _check_sizes(self, "original_max_positions")
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention: Hq query heads and Hk key-value heads of A numbers."""

    symbol: ClassVar[str] = "*"
    label: ClassVar[str] = "attention"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    """Of queries, keys and values."""
    out_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of each query and key head."""
    rope: RopeSpec | None = None
    """None: no positions at all."""

    def __post_init__(self) -> None:
        _check_sizes(self, "num_heads", "num_kv_heads", "head_dim")
        _check_division(self, "num_heads", "num_kv_heads")
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")

    @property
    def kv_elements(self) -> int:
        """Numbers that one token adds to the KV cache."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """Mixture of E experts, M a token, and a shared one; in a latent width where one is given."""

    symbol: ClassVar[str] = "E"
    label: ClassVar[str] = "mixture of experts"
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    latent_size: int | None = None
    num_groups: int = 1
    groups_per_token: int = 1
    norm_topk_prob: bool = True
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        names = ["num_experts", "experts_per_token", "intermediate_size"]
        names += [
            "shared_intermediate_size",
            *([] if self.latent_size is None else ["latent_size"]),
        ]
        _check_sizes(self, *names)
        _check_division(self, "num_experts", "num_groups")
        reachable = self.groups_per_token * (self.num_experts // self.num_groups)
        for name, most in (
            ("groups_per_token", self.num_groups),
            ("experts_per_token", reachable),
        ):
            if not 1 <= getattr(self, name) <= most:
                shown = reprlib.repr(getattr(self, name))
                raise ValueError(f"{name}={shown} must be between 1 and {most}")
        if not math.isfinite(self.scaling_factor):
            raise ValueError(f"scaling_factor={self.scaling_factor} must be a finite number")


@dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """A dense MLP: squared ReLU, or a linear map gated by a SiLU of another."""

    symbol: ClassVar[str] = "-"
    label: ClassVar[str] = "dense MLP"
    intermediate_size: int
    bias: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, "intermediate_size")


LayerSpec = MambaSpec | AttentionSpec | MoESpec | MLPSpec
SPECS: tuple[type[LayerSpec], ...] = (MambaSpec, AttentionSpec, MoESpec, MLPSpec)
S = TypeVar("S", bound=LayerSpec)


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
            _check_positive(name, getattr(self, name))
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
        _check_sizes(self, "hidden_size", "vocab_size")
        _check_positive("norm_eps", self.norm_eps)
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

    @property
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
        return sum(layer.kv_elements for layer in self.layers_of(AttentionSpec))

    @property
    def conv_elements(self) -> int:
        """Numbers of one row's convolution states, over all Mamba layers."""
        return sum(layer.conv_elements for layer in self.layers_of(MambaSpec))

    @property
    def ssm_elements(self) -> int:
        """Numbers of one row's SSM states, over all Mamba layers."""
        return sum(layer.ssm_elements for layer in self.layers_of(MambaSpec))

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
            _check_sizes(self, "vocab_size")
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
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    mask_token_id: int = 3
    block_size: int = 16
    bidirectional_mamba: bool = False
    """Of the denoiser; the context tower is always causal."""
    draft: DraftSpec | None = None
    """Of a thin denoiser; None: the denoiser has embeddings, head and time conditioning."""

    def __post_init__(self) -> None:
        _check_sizes(self, "block_size")
        self._check_reads()
        self._check_ids()

    @classmethod
    def full(cls, family: str, tower: TowerConfig, **values: object) -> "TwoTowerConfig":
        """A denoiser as deep as the context tower: layer j reads layer j."""
        reads = tuple(range(tower.num_layers))
        return cls(family=family, context=tower, denoiser=tower, reads=reads, **values)  # type: ignore[arg-type]

    @property
    def hidden_size(self) -> int:
        """Width of both towers."""
        return self.context.hidden_size

    @property
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
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text; empty when the configuration names none."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else eos

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


def _check_sizes(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if not 1 <= value <= MAX_SIZE:
            raise ValueError(f"{name}={reprlib.repr(value)} must be between 1 and {MAX_SIZE}")


def _check_division(spec: object, whole: str, part: str) -> None:
    if getattr(spec, part) < 1 or getattr(spec, whole) % getattr(spec, part):
        raise ValueError(
            f"{whole}={getattr(spec, whole)} must be a multiple of "
            f"{part}={reprlib.repr(getattr(spec, part))}"
        )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be a number above 0")
