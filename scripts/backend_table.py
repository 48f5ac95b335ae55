"""Write the table of what each backend runs into docs/engine.md, from the rule that decides it.

Usage: python scripts/backend_table.py
"""

import textwrap
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from page_table import PageTable

from twotower.backends import BACKENDS, ROUNDINGS, Quantization, Setup, refusal
from twotower.model.precision import Scheme
from twotower.specs import AttentionSpec, LayerSpec, MambaSpec, MLPSpec, MoESpec, RopeSpec

# Weights as they are loaded: their dtype, and how the checkpoint is quantised.
WEIGHTS: dict[str, tuple[torch.dtype, Scheme | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "int8": (torch.float32, Scheme(weights="int8")),
    "int8-int8": (torch.float32, Scheme(weights="int8", activations="int8")),
    "int4": (torch.float32, Scheme(weights="int4")),
}
DENSE: tuple[LayerSpec, ...] = (
    MambaSpec(num_heads=2, head_dim=4, state_size=8, num_groups=1, conv_width=4),
    AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4),
    MLPSpec(intermediate_size=8),
)
EXPERTS = MoESpec(
    num_experts=2, experts_per_token=1, intermediate_size=8, shared_intermediate_size=8
)
LLAMA: tuple[LayerSpec, ...] = (
    AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, rope=RopeSpec(theta=1e4)),
    MLPSpec(intermediate_size=8, gated=True),
)
LAYERS = {
    "dense": DENSE,
    "Llama": LLAMA,
    "experts": (*DENSE, EXPERTS),
    "experts, mmap": (*DENSE, EXPERTS),
}
DEVICES = ("cpu", "cuda")


class Case(NamedTuple):
    """One combination: keys of WEIGHTS, LAYERS and DEVICES, one of ROUNDINGS."""

    weights: str
    quantization: Quantization
    layers: str
    device: str

    @property
    def setup(self) -> Setup:
        """What a backend is asked for."""
        dtype, scheme = WEIGHTS[self.weights]
        return Setup(
            layers=frozenset(LAYERS[self.layers]),
            quantization=self.quantization,
            scheme=scheme,
            dtypes=frozenset({dtype}),
            devices=frozenset({self.device}),
            expert_storage="mmap" if "mmap" in self.layers else "memory",
        )


def cases() -> Iterator[Case]:
    """Every combination."""
    for values in product(WEIGHTS, ROUNDINGS, LAYERS, DEVICES):
        yield Case(*values)  # type: ignore[arg-type]  # ROUNDINGS holds the literals


def runners(case: Case) -> list[str]:
    """The backends that run a combination."""
    return [name for name in BACKENDS if name != "auto" and refusal(name, case.setup) is None]


def table() -> str:
    """What runs, and after it every sentence of refusal."""
    columns = [(layers, device) for device in DEVICES for layers in LAYERS]
    head = ["weights as loaded", "`--quantization`", *(f"{x}, {d}" for x, d in columns)]
    rows = [head, ["---"] * len(head)]
    for weights, quantization in product(WEIGHTS, ROUNDINGS):
        cells = [", ".join(runners(Case(weights, quantization, *c))) or "-" for c in columns]
        if set(cells) != {"-"}:
            rows.append([weights, quantization, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    names = [name for name in BACKENDS if name != "auto"]
    reasons = {reason for case in cases() for n in names if (reason := refusal(n, case.setup))}
    listed = (textwrap.fill(f"- {r}", 120, subsequent_indent="  ") for r in sorted(reasons))
    return "\n".join([*lines, "", "Everything else is refused, with one of", "", *listed, ""])


TABLE = PageTable("engine.md", "backends", "backend_table.py", table)

if __name__ == "__main__":
    TABLE.write()
