"""Do the fused kernels compute what PyTorch does, and what do they save?

Each kernel at the sizes of a dense model of 1B parameters and of the released 30B-A3B, for 1 to 64
tokens: its largest difference from PyTorch's over the largest value, and the times of both inside a
CUDA graph, as decoding has them. Matrices are read from memory: there are more of them than a cache
holds. int8 products stand beside the same in bfloat16, and come in all tiles that
kernels/fused_products.py offers. Exit status 1 where a difference is beyond its limit. --rehearse
runs them in Triton's interpreter, where triton is installed.

    PYTHONPATH=src python scripts/gpu/kernels.py
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product as pairs_of
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from passes import config_of, dtype_of
from picture import Record
from stage import Stage, reason_of, times_ms
from torch import Tensor

from twotower.cli.scripts import script_parser
from twotower.graphs.arena import Recording
from twotower.graphs.backend import fused_refusal
from twotower.kernels import expert_products, mixing, quantised
from twotower.kernels.mixing import MambaWeights
from twotower.kernels.quantised import dequantise, to_eight_bits
from twotower.lab.report import COLORS, new_figure
from twotower.layers.quantised import QuantisedMatrix
from twotower.specs import MambaSpec, MLPSpec, MoESpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CACHE = 2**28  # bytes: more than any GPU's cache
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # of the largest value

# As a picture draws them; tiles stand in the table alone.
STYLES = {"full precision": "s:", "pytorch": "o--", "fused": "D-"}

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One kernel at one size: what it should give, and the ways to it, `count` times a call."""

    name: str
    size: str
    tokens: int
    expected: Tensor
    ways: Mapping[str, Call]
    count: int
    num_bytes: int
    """Of the weights that the fused kernel reads once."""


class Draw:
    """Random tensors of a device and dtype."""

    def __init__(self, stage: Stage) -> None:
        self.device, self.dtype = stage.device, dtype_of("dense-1b", stage)
        self.copies = 2 if stage.is_rehearsal else 64  # at most
        self.tokens = (1, 4) if stage.is_rehearsal else (1, 4, 16, 64)
        rows, lengths = ((1, 2), (1, 4)) if stage.is_rehearsal else ((1, 4, 16), (1, 16))
        self.shapes = [*pairs_of(rows, lengths)]
        self._generator = torch.Generator(stage.device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        kind = dtype or self.dtype
        return torch.randn(shape, dtype=kind, device=self.device, generator=self._generator)


def products(draw: Draw, fused: Any, sizes: Mapping[str, tuple[int, int]]) -> Iterator[Case]:
    """Of matrices (N, K) by their names."""
    for (name, (rows, columns)), tokens in pairs_of(sizes.items(), draw.tokens):
        count = min(draw.copies, -(-CACHE // (rows * columns)))
        matrices = [to_eight_bits(draw(rows, columns)) for _ in range(count)]
        full, x = [dequantise(m, draw.dtype) for m in matrices], draw(tokens, columns)
        ways: dict[str, Call] = {
            "full precision": each(partial(F.linear, x), full),
            "pytorch": each(partial(quantised.linear, x), matrices),
        }
        if fused is not None:
            ways["fused"] = each(partial(fused.linear, x), matrices)
            for tile in fused.TILES:
                tiled = partial(fused.product, x, ends=None, tile=tile)
                ways[f"fused, tile {tile[0]} x {tile[1]}"] = each(tiled, matrices)
        expected = x.double() @ dequantise(matrices[-1], torch.float64).T
        yield Case("int8 product", name, tokens, expected, ways, count, rows * columns)


def each(call: Callable[[Any], Tensor], matrices: list[Any]) -> Call:
    """The call with one matrix after another; the last result."""
    return lambda: [call(matrix) for matrix in matrices][-1]


def experts(draw: Draw, fused: Any, spec: MoESpec, width: int) -> Iterator[Case]:
    """The routed experts of one layer, of which a few tokens choose more than a cache holds."""
    inner, stacks, full = spec.intermediate_size, list[QuantisedMatrix](), list[Tensor]()
    for shape in ((inner, width), (width, inner)):
        found = [to_eight_bits(draw(*shape)) for _ in range(spec.num_experts)]
        stack = QuantisedMatrix((spec.num_experts, *shape), 8, None, rounds_input=False)
        stack.qdata, stack.scale = (torch.stack([m[part] for m in found]) for part in (0, 1))
        stacks.append(stack)
        full.append(torch.stack([dequantise(m, draw.dtype) for m in found]))
    for tokens in draw.tokens:
        scores = draw(tokens, spec.num_experts, dtype=torch.float32)
        chosen = scores.topk(spec.experts_per_token).indices.flatten().sort().values
        x = draw(len(chosen), width)
        ways = {"full precision": partial(expert_products.grouped_mlp, x, *full, chosen)}
        if fused is not None:
            ways["fused"] = partial(fused.grouped_mlp, x, *stacks, chosen)
        expected = expert_products.grouped_mlp(x.float(), *stacks, chosen)
        num_bytes = len(chosen.unique()) * 2 * inner * width
        yield Case("int8 experts", "one layer", tokens, expected, ways, 1, num_bytes)


def mixing_kernels(draw: Draw, fused: Any, spec: MambaSpec, width: int) -> Iterator[Case]:
    """What stands around the products of a Mamba layer, in rows of one token and of a block."""
    sizes = spec.num_heads, spec.head_dim, spec.num_groups, spec.state_size
    inner = spec.num_heads * spec.head_dim
    channels = inner + 2 * spec.num_groups * spec.state_size
    weights = MambaWeights(
        draw(channels, 1, spec.conv_width), draw(channels), draw(spec.num_heads) - 2,
        draw(spec.num_heads), draw(spec.num_heads),
    )  # fmt: skip
    weight, gates = draw(width), draw(inner)
    for rows, length in draw.shapes:
        x, shift, scale = draw(rows, 1, length, width), *draw(2, rows, 1, 1, width)
        window = draw(rows, spec.conv_width - 1 + length, channels)
        dt, seed = draw(rows, length, spec.num_heads), draw(rows, *sizes[:2], sizes[3])
        y, gate = draw(2, rows, length, inner)
        calls: dict[str, Callable[[Any], Tensor]] = {
            "residual and norm": lambda m, x=x, by=(shift, scale): m.add_norm(
                x, (x, by[0]), weight, 1e-5, by, True
            )[1],
            "gated norm": lambda m, y=y, gate=gate: m.gated_rms_norm(
                y, gate, gates, spec.num_groups, 1e-5
            ),
            "convolution and scan": lambda m, w=window, dt=dt, seed=seed: (
                m.conv_scan(w, dt, weights, sizes, seed.float(), None, None).y
            ),
        }
        for name, call in calls.items():
            ways = {"pytorch": partial(call, mixing.TORCH)}
            if fused is not None:
                ways["fused"] = partial(call, fused)
            yield Case(name, f"{length} a row", rows * length, ways["pytorch"](), ways, 1, 0)


def cases(stage: Stage, fused: Any) -> Iterator[Case]:
    """All of them, the small ones first."""
    draw, released = Draw(stage), config_of("nano-30b", stage.is_rehearsal)
    dense = config_of("dense-1b", stage.is_rehearsal)
    (inner,) = {x.intermediate_size for x in dense.context.layers if isinstance(x, MLPSpec)}
    mamba, moe = (
        next(layer for layer in released.context.layers if isinstance(layer, kind))
        for kind in (MambaSpec, MoESpec)
    )
    assert isinstance(mamba, MambaSpec) and isinstance(moe, MoESpec)
    width = dense.hidden_size
    yield from mixing_kernels(draw, fused and fused.FUSED, mamba, released.hidden_size)
    sizes = {"attention": (width, width), "MLP, up": (inner, width), "MLP, down": (width, inner)}
    of_products = fused and fused.fused_products
    yield from products(draw, of_products, sizes | {"head": (dense.vocab_size, width)})
    yield from experts(draw, of_products, moe, released.hidden_size)


def measure(stage: Stage, case: Case) -> dict[str, Any]:
    """Differences and times of all ways; a recording where there is a GPU."""
    differences, times = {}, {}
    for name, call in case.ways.items():
        found = call().double()
        largest = float(case.expected.double().abs().max())
        differences[name] = float((found - case.expected.double()).abs().max()) / largest
        run: Callable[[], object] = call
        if stage.device.type == "cuda":
            run = Recording(call, torch.cuda.graph_pool_handle(), stage.device)
        repeats = 1 if stage.is_rehearsal else 20
        times[name] = times_ms(run, repeats, stage.device, case.count)["median"] * 1e3
    limit = LIMITS[dtype_of("dense-1b", stage)]
    fastest = times.get("fused", times.get("pytorch"))
    return {
        "us": {name: round(value, 2) for name, value in times.items()},
        "of_largest": differences,
        "gb_per_s": round(case.num_bytes / fastest / 1e3, 1) if fastest else None,
        "is_right": all(one <= limit for one in differences.values()),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Microseconds of each way."""
    lines = [f"{'kernel':22} {'size':10} {'tokens':>6}  microseconds"]
    for one in results:
        if "us" in one:
            ways = ", ".join(f"{name} {value:g}" for name, value in one["us"].items())
            lines.append(f"{one['kernel']:22} {one['size']:10} {one['tokens']:6}  {ways}")
    return "\n".join(lines)


def paint(record: Record) -> "Figure":
    """Times over tokens, a panel for each kernel, a colour for each size, a line for each way."""
    from matplotlib.ticker import LogLocator, NullFormatter

    timed = [one for one in record["results"] if "us" in one]
    kernels = list(dict.fromkeys(one["kernel"] for one in timed))
    figure = new_figure(12, 8)
    figure.suptitle("Kernels: PyTorch's ways and the fused one")
    for place, kernel in enumerate(kernels, 1):
        axes = figure.add_subplot(2, 3, place, title=kernel, yscale="log")
        own = [one for one in timed if one["kernel"] == kernel]
        for color, size in zip(COLORS, dict.fromkeys(one["size"] for one in own), strict=False):
            axes.plot([], [], color=color, label=size)
            for way, style in STYLES.items():
                points = sorted(
                    (one["tokens"], one["us"][way])
                    for one in own
                    if one["size"] == size and way in one["us"]
                )
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=color)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens", ylabel="time of a call, µs")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 2, high * 4)  # room for the legend, and for ticks where times are alike
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(ncols=2)
    ways = [way for way in STYLES if any(way in one["us"] for one in timed)]
    key = figure.add_subplot(2, 3, 6)
    key.set_axis_off()
    for way in ways:
        key.plot([], [], STYLES[way], color="black", label=way)
    key.legend(loc="center", title="in all panels", handlelength=5)
    return figure


@torch.no_grad()
def main() -> int:
    parser = script_parser(__doc__)
    stage, fused = Stage("kernels", parser, paint), None
    if stage.is_rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
    # In the interpreter they run anywhere.
    reason = fused_refusal(torch.device("cuda"))
    if reason is None:
        from twotower.kernels import fused
    stage.save(without_fused_kernels=reason)
    for case in cases(stage, fused):
        values = {"kernel": case.name, "size": case.size, "tokens": case.tokens}
        if stage.is_over or stage.has(**values):
            continue
        try:
            stage.add(**values, **measure(stage, case))
        except (RuntimeError, ValueError) as error:
            stage.add(**values, failed=reason_of(error))
    stage.close()
    print(table(stage.results))
    wrong = [one for one in stage.results if not one.get("is_right", False)]
    print(f"{len(stage.results)} results, {len(wrong)} wrong or failed: {stage.args.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
