"""The examples of docs/plan.md: the released 30B on machines of five kinds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.plan_validation.published import released

from twotower.lab.plan import PlanOptions
from twotower.lab.plan.record import plan_shape

EXAMPLES: Sequence[Mapping[str, Any]] = (
    {"hardware": "h100-sxm"},
    {"hardware": "h100-sxm", "quantization": "int8"},
    {"hardware": "h100-sxm", "devices": 2},
    {"hardware": "h100-sxm", "devices": 2, "batch_size": 32},
    {"hardware": "h100-sxm", "devices": 2, "efficiency": "graph-gpu"},
    {"hardware": "h100-sxm", "devices": 2, "batch_size": 32, "efficiency": "graph-gpu"},
    {"hardware": "rtx-4090", "quantization": "int4"},
    {"hardware": "rtx-4090", "quantization": "int4", "devices": 2},
    {"hardware": "m3-ultra"},
    {"hardware": "m3-ultra", "quantization": "int4"},
    {"hardware": "m3-ultra", "quantization": "int4", "batch_size": 16},
    {"hardware": "epyc-9654"},
    {"hardware": "epyc-9654", "quantization": "int4"},
)


def example_table() -> str:
    """A line per example: speeds, costs, where the denoiser goes, break-even, who wins."""
    lines = [
        "| `twotower plan` | AR | diffusion | where diffusion runs | $ a million, AR, diffusion "
        "| AR's speed from | faster, by rows at a time; per device |",
        "|---|---|---|---|---|---|---|",
    ]
    for example in EXAMPLES:
        record = plan_shape(released(), PlanOptions(**example))
        lines.append(f"| {' | '.join(_cells(example, record))} |")
    return "\n".join(lines)


def _cells(example: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    modes = [record["modes"][mode] for mode in ("ar", "diffusion")]
    yield " ".join(f"`--{name.replace('_', '-')} {value}`" for name, value in example.items())
    for found in modes:
        yield f"{found['tokens_per_s']:.0f}" if found["fits"] else "does not fit"
    yield modes[1]["device_map"]["name"].replace(" in host memory", " in the host")
    yield ", ".join(_cost(found) for found in modes)
    even = record["break_even"]
    needed = None if even is None else even["tokens_per_nfe"]["1"]
    yield "never" if needed is None else f"{needed:.1f} tokens/NFE"
    spans = [_spans(record["spans"][name]) for name in ("all", "per_device")]
    yield "; ".join(dict.fromkeys(spans))


def _cost(found: Mapping[str, Any]) -> str:
    cost = found.get("dollars_per_million_tokens")
    return "-" if cost is None else f"{cost:.1f}"


def _spans(spans: Sequence[Mapping[str, Any]]) -> str:
    """'ar, diffusion from 7, ar from 62'."""
    return ", ".join(
        span["winner"] + (f" from {span['first']}" if place else "")
        for place, span in enumerate(spans)
    )
