"""A benchmark's record for readers: tables and sentences for the terminal, and pictures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from twotower.lab.bench.results import TARGET, block_cost
from twotower.lab.report import COLORS, Record, Table, new_axes, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COSTS = (
    "engine", "mode", "ms/token", "quartiles", "tokens/s", "decode ms", "x best", "x own",
    "tok/NFE", "right",
)  # fmt: skip
_LIMITS = ("engine", "pass", "ms", "MB", "Mop", "by bytes", "by ops", "regime")
MODE_MARKERS = "s^vDP*"  # rings are where curves cross a level


def tables(size: str, found: Record) -> list[Table]:
    """What a token costs each runner, and each pass beside the least that the machine allows."""
    title = f"{size}: {found['n']} {'replays' if found['is_replay'] else 'prompts'}"
    costs = [
        _cost_row(engine, mode, row, found["is_replay"])
        for engine, modes in found["engines"].items()
        for mode, row in modes.items()
    ]
    limits = [_limit_row(row) for row in found["limits"]]
    passes = f"{size}: passes after {found['num_past']} tokens"
    return [Table(title, _COSTS, costs), Table(passes, _LIMITS, limits)]


def _cost_row(engine: str, mode: str, row: Record, is_replay: bool) -> list[str]:
    """A replay's speed-ups are those of decoding: its prompts are not real."""
    decode = "decode_" if is_replay else ""
    low, high = row["ms_per_token_quartiles"]
    return [
        engine,
        mode,
        number(row["ms_per_token"]),
        f"{low:.2f}-{high:.2f}",
        number(row["tokens_per_s"], 0),
        number(row["decode_ms_per_token"]),
        number(row[f"{decode}speedup_vs_best_ar"]),
        number(row[f"{decode}speedup_vs_own_ar"]),
        number(row["tokens_per_nfe"]),
        f"{row['correct']}/{row['n']}" if "correct" in row else "-",
    ]


def _limit_row(row: Record) -> list[str]:
    return [
        row["engine"],
        row["call"],
        number(row["ms"]),
        number(row["bytes"] / 1e6, 1),
        number(row["operations"] / 1e6, 0),
        number(row["stream_ms"]),
        number(row["compute_ms"]),
        row["regime"] + (", in cache" if row["is_in_cache"] else ""),
    ]


def describe_break_even(engine: str, pays: Record, found: Record) -> str:
    """What a pass of a block costs in AR steps, and how many tokens it must commit."""
    needed, cycle = pays["needed_tokens_per_nfe"], pays["needed_tokens_per_cycle"]
    size = found["model"]["block_size"]
    lines = [
        f"{engine}: a pass of {size} tokens costs {pays['denoise_per_ar_step']:.2f} AR steps, "
        f"an extension {pays['extend_per_ar_step']:.2f}, a verification "
        f"{pays['verify_per_ar_step']:.2f}."
    ]
    for name, words in (
        ("own_ar", "its own AR step"),
        ("best_ar", f"the best AR ({found['best_ar_decode'][0]})"),
    ):
        for speedup, tokens in needed[name].items():
            accepted = cycle[name][speedup]
            blocks = (
                "out of reach in blocks" if tokens is None else f"{tokens:.1f} tokens/NFE in blocks"
            )
            cycles = (
                "out of reach of speculation"
                if accepted > size
                else f"{accepted:.1f} tokens a cycle of speculation"
            )
            lines.append(f"  {speedup} times {words}: {blocks}, {cycles}.")
    return "\n".join(lines)


def bench_figures(record: Record) -> dict[str, "Figure"]:
    """Every picture of the record by the name of its file."""
    made = {"speed": plot_speed(record)}
    for size, found in record["sizes"].items():
        made[f"break_even_{size}"] = plot_break_even(size, found)
    return made


def plot_speed(record: Record) -> "Figure":
    """Tokens per second of every runner, decoding alone, by size."""
    rows = [
        (f"{size}, {engine} {mode}", mode, found)
        for size, entry in record["sizes"].items()
        for engine, modes in entry["engines"].items()
        for mode, found in modes.items()
        if found["decode_ms_per_token"] is not None
    ]
    figure, axes = new_axes(1.4 + 0.3 * len(rows))
    modes = list(dict.fromkeys(mode for _, mode, _ in rows))
    for at, (_, mode, found) in enumerate(reversed(rows)):
        slow, fast = (1e3 / ms for ms in reversed(found["decode_ms_per_token_quartiles"]))
        middle = 1e3 / found["decode_ms_per_token"]
        color = COLORS[modes.index(mode) % len(COLORS)]
        axes.plot([slow, fast], [at, at], color=color, linewidth=2)
        axes.plot([middle], [at], "o", color=color)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
    axes.set_ylim(-1, len(rows))
    axes.set_xscale("log")
    axes.set_xlabel("tokens/s, prompt apart; median, quartiles")
    axes.set_title("Speed")
    return figure


def plot_break_even(size: str, found: Record) -> "Figure":
    """Speed-up over the best AR against tokens per pass: composed of pass times, and measured."""
    figure, axes = new_axes(5.0)
    block_size = found["model"]["block_size"]
    rates = [1 + step * (block_size - 1) / 60 for step in range(61)]
    for place, (engine, calls) in enumerate(found["ms_by_engine"].items()):
        denoise, extend = calls["denoise_pass"]["median"], calls["extend"]["median"]
        needed = found["pays"][engine]["needed_tokens_per_nfe"]
        for name, words, ar_ms, line in (
            ("own_ar", "its own AR step", calls["ar_step"]["median"], "--"),
            ("best_ar", f"best AR, {found['best_ar_decode'][0]}", found["best_ar_decode_ms"], "-"),
        ):
            speedups = [ar_ms / block_cost(denoise, extend, k, block_size) for k in rates]
            axes.plot(rates, speedups, line, color=COLORS[place], label=f"{engine} over {words}")
            _mark_break_even(axes, needed[name], COLORS[place])
    _mark_measured(axes, found)
    for level in (1.0, TARGET):
        axes.axhline(level, color="gray", linestyle=":", linewidth=1)
        axes.annotate(f"{level:g}", (1.0, level), fontsize=8, color="gray", va="bottom")
    axes.set_xlabel("tokens per denoiser pass (tokens/NFE)")
    axes.set_ylabel("speed-up, decoding alone")
    axes.set_title(f"When blocks pay, {size}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _mark_break_even(axes: "Axes", needed: Mapping[str, float | None], color: str) -> None:
    """A ring where a line crosses a level, with its tokens per pass."""
    for speedup, tokens in needed.items():
        if tokens is not None and tokens >= 1:
            point = (tokens, float(speedup))
            axes.plot(*point, "o", color=color, fillstyle="none")
            axes.annotate(
                f"{tokens:.1f}", point, textcoords="offset points", xytext=(4, -10), fontsize=7
            )


def _mark_measured(axes: "Axes", found: Record) -> None:
    """A point for each mode with denoiser passes, over the best AR, in its engine's colour."""
    colors = dict(zip(found["ms_by_engine"], COLORS, strict=False))
    shapes: dict[str, str] = {}
    for engine, modes in found["engines"].items():
        for mode, row in modes.items():
            if row["tokens_per_nfe"] is None or row["decode_speedup_vs_best_ar"] is None:
                continue
            shape = shapes.setdefault(mode, MODE_MARKERS[len(shapes) % len(MODE_MARKERS)])
            point = (row["tokens_per_nfe"], row["decode_speedup_vs_best_ar"])
            axes.plot(*point, shape, color=colors[engine], markersize=6, markeredgecolor="black")
    for mode, shape in shapes.items():
        axes.plot([], [], shape, color="gray", label=f"{mode}, measured over the best AR")
