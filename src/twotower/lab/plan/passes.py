"""What a pass of a tower moves and computes, part by part, and how long that takes on a machine.

A pass streams every weight that it needs once, and its rows' keys and states. Parts run one after
another; each takes the longer of its streaming and its arithmetic.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from twotower.checkpoint.inspect import Description, Tower
from twotower.config import TowerConfig, TwoTowerConfig
from twotower.lab.plan.hardware import Compute, Hardware
from twotower.lab.plan.inputs import Efficiency, Widths
from twotower.specs import AttentionSpec, MoESpec

_MATRICES = ("mamba", "attention", "mlp", "norms", "moe router", "moe shared")
EXPERTS = "moe routed"
AR_STEP, DENOISE, EXTEND, VERIFY = "ar_step", "denoise_pass", "extend", "verify"
_SCAN = 5  # operations on each number of an SSM state: decay, outer product, sum; readout


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as a plan sees it: parameters of each tower by kind, and the configuration."""

    name: str
    config: TwoTowerConfig
    parameters: Mapping[Tower, Mapping[str, int]]

    @classmethod
    def of(cls, record: Description) -> "ModelShape":
        """From what `twotower inspect` knows; the denoiser is a copy where there is none."""
        context = record.towers["context"].parameters
        denoiser = record.towers["denoiser"].parameters if "denoiser" in record.towers else context
        return cls(
            name=record.source,
            config=record.config,
            parameters={"context": context, "denoiser": denoiser},
        )

    def tower(self, tower: Tower) -> TowerConfig:
        """Sizes and layers of one of them."""
        return self.config.context if tower == "context" else self.config.denoiser

    @property
    def experts(self) -> MoESpec | None:
        """What all layers of experts have in common."""
        return self.config.context.shared_spec(MoESpec)


@dataclass(frozen=True, kw_only=True)
class PlanSetup:
    """What stays fixed over a plan: the model, one device, widths, how well code runs on it."""

    shape: ModelShape
    hardware: Hardware
    widths: Widths
    efficiency: Efficiency
    compute: Compute

    def __post_init__(self) -> None:
        if self.compute not in self.hardware.tflops:
            raise ValueError(
                f"compute: {self.hardware.name} has no rate for {self.compute!r}; "
                f"allowed are {', '.join(self.hardware.tflops)}"
            )


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward: each of `rows` reads `tokens` after `past`, and makes logits of some of them."""

    tower: Tower
    rows: int
    tokens: int
    logits: int
    past: float


def call_shapes(block_size: int) -> dict[str, tuple[Tower, int, int]]:
    """The passes that modes are made of: tower, tokens read, positions whose logits are made."""
    return {
        AR_STEP: ("context", 1, 1),
        DENOISE: ("denoiser", block_size, block_size),
        EXTEND: ("context", block_size, 0),
        VERIFY: ("context", block_size, block_size),
    }


class PassPart(NamedTuple):
    """Bytes that a part of a pass moves (weights apart from cache) and operations it computes."""

    name: str
    weight_bytes: float
    cache_bytes: float
    operations: float


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Seconds of a pass and what they go to; stream and compute count where they rule a part."""

    seconds: float
    overhead_s: float
    stream_s: float
    compute_s: float
    host_s: float
    num_experts: float

    @property
    def ruled_by(self) -> str:
        """The largest share: overhead, bandwidth, arithmetic or host link."""
        shares = self.overhead_s, self.stream_s, self.compute_s, self.host_s
        names = "overhead", "bandwidth", "arithmetic", "host link"
        return names[shares.index(max(shares))]


def expected_experts(num_experts: int, per_token: int, num_tokens: float) -> float:
    """E (1 - (1 - k/E)^n) experts, if tokens choose alone and evenly: an upper estimate."""
    missed = math.pow(1.0 - per_token / num_experts, num_tokens)
    return num_experts * (1.0 - missed)


def pass_parts(shape: ModelShape, call: Pass, widths: Widths) -> list[PassPart]:
    """The parts of a pass: matrices, routed experts, head, time conditioning, cache."""
    counts, n = shape.parameters[call.tower], call.rows * call.tokens
    parts = [_matrices(k, counts[k], n, widths) for k in _MATRICES if k in counts]
    if EXPERTS in counts:
        assert shape.experts is not None
        parts.append(_experts(shape.experts, counts[EXPERTS], n, widths))
    if call.logits:
        head, draft = counts.get("head", 0), shape.config.draft
        # Tied heads count as embeddings, a thin denoiser's of all tokens as the other tower's.
        of_all = call.tower == "denoiser" and draft is not None and draft.vocab_size is None
        if head == 0 or of_all:
            head += shape.config.hidden_size * shape.config.vocab_size
        parts.append(_matrices("head", head, call.rows * call.logits, widths))
    if call.tower == "denoiser" and "time conditioning" in counts:
        kind = "time conditioning"
        parts.append(_matrices(kind, counts[kind], call.rows, widths))
    return [*parts, _mixing(shape, call, widths)]


def _matrices(kind: str, count: int, num_tokens: float, widths: Widths) -> PassPart:
    return PassPart(kind, count * widths.weight_bytes(kind), 0.0, 2.0 * count * num_tokens)


def _experts(moe: MoESpec, count: int, num_tokens: int, widths: Widths) -> PassPart:
    total, chosen = moe.num_experts, moe.experts_per_token
    touched = expected_experts(total, chosen, num_tokens) / total
    weight_bytes = count * touched * widths.weight_bytes(EXPERTS)
    return PassPart(EXPERTS, weight_bytes, 0.0, 2.0 * count * chosen / total * num_tokens)


def _mixing(shape: ModelShape, call: Pass, widths: Widths) -> PassPart:
    """Attention over keys and the scan: their weights are among the matrices, here is the rest."""
    config, length = shape.tower(call.tower), call.past + call.tokens
    state_bytes = 4.0 * config.ssm_elements + config.conv_elements * widths.cache_bytes
    if call.tower == "context":
        state_bytes *= 2  # the denoiser only reads them
    keys = config.kv_elements * length * widths.kv_bytes
    # A causal token sees half of its own call on average, a masked one the whole block.
    seen = length if call.tower == "denoiser" else call.past + (call.tokens + 1) / 2
    queries = sum(one.num_heads * one.head_dim for one in config.layers_of(AttentionSpec))
    operations = call.rows * call.tokens * (4.0 * queries * seen + _SCAN * config.ssm_elements)
    return PassPart("cache", 0.0, call.rows * (keys + state_bytes), operations)


def time_pass(setup: PlanSetup, call: Pass, host_share: float = 0.0) -> PassTime:
    """How long a pass takes; `host_share` of the routed experts' bytes cross the host link."""
    parts = pass_parts(setup.shape, call, setup.widths)
    hardware, efficiency = setup.hardware, setup.efficiency
    bandwidth = hardware.bytes_per_s(sum(part.weight_bytes for part in parts))
    bandwidth *= efficiency.bandwidth
    peak = 1e12 * hardware.tflops[setup.compute] * efficiency.arithmetic
    spent = {"stream": 0.0, "compute": 0.0, "host": 0.0}
    for part in parts:
        far = host_share * part.weight_bytes if part.name == EXPERTS else 0.0
        host = far / (1e9 * (hardware.host_gb_s or 1.0) * efficiency.bandwidth)
        stream = (part.weight_bytes + part.cache_bytes - far) / bandwidth
        compute = part.operations / peak
        if host + stream >= compute:
            spent["host"] += host
            spent["stream"] += stream
        else:
            spent["compute"] += compute
    overhead = setup.shape.tower(call.tower).num_layers * efficiency.layer_s
    overhead *= 1 + efficiency.row_share * (call.rows - 1)
    num_experts, moe = 0.0, setup.shape.experts
    if moe is not None and EXPERTS in setup.shape.parameters[call.tower]:
        num_tokens = call.rows * call.tokens
        num_experts = expected_experts(moe.num_experts, moe.experts_per_token, num_tokens)
    return PassTime(
        seconds=overhead + sum(spent.values()),
        overhead_s=overhead,
        **{f"{kind}_s": seconds for kind, seconds in spent.items()},
        num_experts=num_experts,
    )
