"""What a plan takes as given: bits of weights, how well code uses a machine, what is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from twotower.arguments import COUNT, SHARE, check, check_fields, number
from twotower.lab.plan.hardware import Kind

Width = Literal["float32", "bfloat16", "int8", "int4"]
DType = Literal["float32", "bfloat16"]
KVDType = Literal["float32", "bfloat16", "float16"]
Mode = Literal["ar", "diffusion", "speculative"]
MODES: tuple[Mode, ...] = get_args(Mode)
# As our own checkpoints store them: int8 with a scale per row, which does not count; int4 with a
# scale and a zero of 16 bits per 32 weights.
BITS: dict[str, float] = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "int4": 5.0}


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Widths of the parts: routed and shared experts; matrices of Mamba, attention and MLP; head.

    `dtype` is of what is never quantised (embedding table, norms, time conditioning) and of the
    cache, but for keys and values where `kv_dtype` says otherwise. Routers are float32.
    """

    experts: Width
    projections: Width
    head: Width
    dtype: DType
    kv_dtype: KVDType | None = None

    def __post_init__(self) -> None:
        if self.head == "int4":
            raise ValueError("head_weights: int4 breaks the choice of tokens; use int8 or wider")

    def weight_bytes(self, kind: str) -> float:
        """Bytes of one weight of a kind of parameter, as `twotower inspect` names kinds."""
        widths: dict[str, Width] = {
            **dict.fromkeys(("moe routed", "moe shared"), self.experts),
            **dict.fromkeys(("mamba", "attention", "mlp"), self.projections),
            **{"head": self.head, "moe router": "float32"},
        }
        return BITS[widths.get(kind, self.dtype)] / 8

    @property
    def cache_bytes(self) -> float:
        """Bytes of a cached convolution input; SSM states are float32."""
        return BITS[self.dtype] / 8

    @property
    def kv_bytes(self) -> float:
        """Bytes of a cached key or value."""
        return 4.0 if (self.kv_dtype or self.dtype) == "float32" else 2.0


def uniform(width: Width) -> Widths:
    """One width for all matrices, but 8 bits for a head beside int4; float32 stays float32."""
    dtype: DType = "float32" if width == "float32" else "bfloat16"
    head: Width = "int8" if width == "int4" else width
    return Widths(experts=width, projections=width, head=head, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peaks that are reached, and seconds of every layer that do no such work.

    `row_share`: of a layer's seconds, what every further row of a batch takes again.
    """

    bandwidth: float
    arithmetic: float
    layer_s: float
    row_share: float = 0.0

    def __post_init__(self) -> None:
        named = {  # as a user gives them
            "bandwidth_share": self.bandwidth,
            "arithmetic_share": self.arithmetic,
            "layer_us": self.layer_s * 1e6,
            "row_share": self.row_share,
        }
        check(named, _EFFICIENCY_CHECKS)


_reached = number(0, 1, is_above=True)
_EFFICIENCY_CHECKS = {
    "bandwidth_share": _reached,
    "arithmetic_share": _reached,
    "layer_us": number(0, 1e6, is_below=True),
    "row_share": SHARE,
}

# benchmarks/plan_validation.py solves for the values that are said to be calibrated and prints
# them; tests/unit/test_plan_validation.py holds the two equal.
PROFILES: Mapping[str, Efficiency] = {
    # What no code can beat.
    "limit": Efficiency(bandwidth=1.0, arithmetic=1.0, layer_s=0.0),
    # Eager code with kernels for the experts. Bandwidth and layer_s: the two AR figures of the
    # DGX Spark port, nothing else. Arithmetic: an assumption, too small a part there to be seen.
    "eager-gpu": Efficiency(bandwidth=0.74, arithmetic=0.5, layer_s=506e-6),
    # The same with launches out of the way (CUDA graphs): layer_s is an assumption.
    "graph-gpu": Efficiency(bandwidth=0.74, arithmetic=0.5, layer_s=20e-6),
    # Our own backends, one thread: AR step and pass of the 160M model, AR step of the shipped one.
    # row_share: what 16 rows of the shipped one gain over one in AR decoding.
    "eager-cpu": Efficiency(bandwidth=0.431, arithmetic=0.263, layer_s=158e-6, row_share=0.153),
    "native-cpu": Efficiency(bandwidth=0.756, arithmetic=0.969, layer_s=36.3e-6, row_share=0.449),
    # The same three with --quantization int8: int8 arithmetic as well.
    "native-int8-cpu": Efficiency(bandwidth=0.795, arithmetic=0.658, layer_s=21e-6, row_share=0.43),
}
DEFAULTS: Mapping[Kind, str] = {"gpu": "eager-gpu", "unified": "eager-gpu", "cpu": "eager-cpu"}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`batch_size` rows, each reads a prompt and writes `new_tokens`; all rows are taken as equal.

    `tokens_per_nfe`: of diffusion; `tokens_per_cycle`: of speculation, one draft and one
    verification. None where it is not known.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    block_size: int
    tokens_per_nfe: float | None = None
    tokens_per_cycle: float | None = None
    draft_passes: int = 1

    def __post_init__(self) -> None:
        counts = ("batch_size", "prompt_tokens", "new_tokens", "block_size", "draft_passes")
        check_fields(self, dict.fromkeys(counts, COUNT))
        of_block = {
            "tokens_per_nfe": number(0, self.block_size, is_above=True),
            "tokens_per_cycle": number(1, self.block_size),  # the context tower's own, at the least
        }
        check_fields(self, of_block)

    def yield_of(self, mode: Mode) -> float | None:
        """Tokens of a pass, or cycle, of a mode; None where it is not known."""
        known = {"ar": 1.0, "diffusion": self.tokens_per_nfe}
        return known.get(mode, self.tokens_per_cycle)

    @property
    def extensions(self) -> int:
        """Blocks that the context tower reads back: all but the last, which ends the row."""
        return -(-self.new_tokens // self.block_size) - 1

    @property
    def mean_past(self) -> float:
        """Tokens in the cache half-way through the answer."""
        return self.prompt_tokens + self.new_tokens / 2
