"""The layers of a tower by their sizes, each checked when it is made."""

import math
import reprlib
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeVar

from twotower.arguments import ABOVE_ZERO, check, check_fields, number

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
        check_sizes(self, "num_heads", "head_dim", "state_size", "num_groups", "conv_width")
        check_division(self, "num_heads", "num_groups")

    @cached_property
    def width(self) -> int:
        """Channels of x: H * P."""
        return self.num_heads * self.head_dim

    @cached_property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: C = H * P + 2 * G * N."""
        return self.width + 2 * self.num_groups * self.state_size


RopeScaling = Literal["none", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions: frequencies theta^(-2i/A), and how a scaling stretches them.

    linear: all are divided by `factor`. llama3: those whose wavelength is above
    original_max_positions / low_freq_factor are, those below original_max_positions /
    high_freq_factor are not, and between them the change is gradual. yarn: the same between pairs
    that turn beta_slow and beta_fast times in original_max_positions, with whole numbers of pairs
    where truncate is said, and a product of queries and keys grows by attention_factor^2.
    """

    theta: float
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            check_positive(name, getattr(self, name))
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            check_positive(name, getattr(self, name))
        if self.scaling == "yarn" and self.theta == 1.0:
            raise ValueError("theta=1.0 turns all pairs alike, which yarn cannot tell apart")
        check_sizes(self, "original_max_positions")
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
    window: int | None = None
    """Sliding window: a token attends to itself, to the window - 1 tokens before it, and in a block
    of the denoiser to those behind it. None: to all."""

    def __post_init__(self) -> None:
        check_sizes(self, "num_heads", "num_kv_heads", "head_dim")
        check_division(self, "num_heads", "num_kv_heads")
        if self.window is not None:
            check_sizes(self, "window")
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """Mixture of E experts, M a token, and a shared one; in a latent width where one is given.

    router: what scores an expert, each by itself or all of them together. gated: experts, shared
    one too, are gated MLPs, others squared-ReLU ones. shared_intermediate_size 0: no shared expert.
    """

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
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    gated: bool = False

    def __post_init__(self) -> None:
        names = ["num_experts", "experts_per_token", "intermediate_size"]
        names += [] if self.latent_size is None else ["latent_size"]
        check_sizes(self, *names)
        check_fields(self, {"shared_intermediate_size": number(0, MAX_SIZE, is_whole=True)})
        check_division(self, "num_experts", "num_groups")
        reachable = self.groups_per_token * (self.num_experts // self.num_groups)
        check_fields(self, {"groups_per_token": number(1, self.num_groups, is_whole=True)})
        check_fields(self, {"experts_per_token": number(1, reachable, is_whole=True)})
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
        check_sizes(self, "intermediate_size")


LayerSpec = MambaSpec | AttentionSpec | MoESpec | MLPSpec
SPECS: tuple[type[LayerSpec], ...] = (MambaSpec, AttentionSpec, MoESpec, MLPSpec)
S = TypeVar("S", bound=LayerSpec)


def check_sizes(spec: object, *names: str) -> None:
    """ValueError (one line) for a named size that no model has."""
    check_fields(spec, dict.fromkeys(names, number(1, MAX_SIZE, is_whole=True)))


def check_division(spec: object, whole: str, part: str) -> None:
    """ValueError (one line) unless one size is a multiple of another."""
    if getattr(spec, part) < 1 or getattr(spec, whole) % getattr(spec, part):
        raise ValueError(
            f"{whole}={getattr(spec, whole)} must be a multiple of "
            f"{part}={reprlib.repr(getattr(spec, part))}"
        )


def check_positive(name: str, value: float) -> None:
    """ValueError (one line) unless a value is a finite number above 0."""
    check({name: value}, {name: ABOVE_ZERO})
