"""Bits of a weight by part of the model, and of a cached number."""

from dataclasses import dataclass
from typing import Literal, get_args

Width = Literal["float32", "bfloat16", "int8", "int4"]
DType = Literal["float32", "bfloat16"]
# As our own checkpoints store them: int8 with a scale per row, which does not count; int4 with a
# scale and a zero of 16 bits per 32 weights.
BITS: dict[str, float] = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "int4": 5.0}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Widths of the parts: routed and shared experts; matrices of Mamba, attention and MLP; head.

    `dtype` is of what is never narrowed (embedding table, norms, time conditioning) and of the
    cache. Routers are float32.
    """

    experts: Width
    projections: Width
    head: Width
    dtype: DType

    def __post_init__(self) -> None:
        for name in ("experts", "projections", "head"):
            _check(name, getattr(self, name), get_args(Width))
        _check("dtype", self.dtype, get_args(DType))
        if self.head == "int4":
            raise ValueError("head: 'int4' breaks the choice of tokens; use int8 or wider")

    def weight_bytes(self, kind: str) -> float:
        """Bytes of one weight of a kind of parameter, as `twotower inspect` names kinds."""
        match kind:
            case "moe routed" | "moe shared":
                width: str = self.experts
            case "mamba" | "attention" | "mlp":
                width = self.projections
            case "head":
                width = self.head
            case "moe router":
                width = "float32"
            case _:
                width = self.dtype
        return BITS[width] / 8

    @property
    def cache_bytes(self) -> float:
        """Bytes of a cached key, value or convolution input; SSM states are float32."""
        return BITS[self.dtype] / 8


def uniform(width: Width) -> Precision:
    """One width for all matrices, but 8 bits for a head beside int4; float32 stays float32."""
    dtype: DType = "float32" if width == "float32" else "bfloat16"
    head: Width = "int8" if width == "int4" else width
    return Precision(experts=width, projections=width, head=head, dtype=dtype)


def _check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is no precision; allowed are {', '.join(allowed)}")
