"""A race's record as tables in a terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]
_COSTS = (
    "ms/token",
    "quartiles",
    "tokens/s",
    "decode ms",
    "x best",
    "x ours",
    "x own",
    "tok/NFE",
    "right",
)
_LIMITS = ("ms", "MB", "Mop", "by bytes", "by ops", "regime")


def print_race(record: Record, console: Console) -> None:
    """Costs, passes, break-even and limits of every size; then what was missing or doubtful."""
    for size, found in record["sizes"].items():
        console.print(cost_table(size, found))
        console.print(limit_table(size, found))
        for engine, pays in found["pays"].items():
            console.print(describe_break_even(engine, pays, found))
    for line in dict.fromkeys(
        line for found in record["sizes"].values() for line in found["missing"]
    ):
        console.print(f"not raced: {line}")
    for line in record["warnings"]:
        console.print(f"warning: {line}")


def cost_table(size: str, found: Record) -> Table:
    """Cost of a token for every contestant, over the best AR of all and of ours."""
    title = f"{size}: {found['n']} {'replays' if found['is_replay'] else 'prompts'}"
    table = _new_table(title, ("engine", "mode"), _COSTS)
    for engine, modes in found["engines"].items():
        for mode, row in modes.items():
            right = f"{row['correct']}/{row['n']}" if "correct" in row else "-"
            table.add_row(
                engine,
                mode,
                f"{row['ms_per_token']:.2f}",
                _range(row["ms_per_token_quartiles"]),
                f"{row['tokens_per_s']:.0f}",
                _number(row["decode_ms_per_token"]),
                _number(_of(row, found, "speedup_vs_best_ar")),
                _number(_of(row, found, "speedup_vs_our_ar")),
                _number(_of(row, found, "speedup_vs_own_ar")),
                _number(row["tokens_per_nfe"]),
                right,
            )
    return table


def limit_table(size: str, found: Record) -> Table:
    """Each pass beside the least that bandwidth and arithmetic allow."""
    title = f"{size}: passes after {found['num_past']} tokens"
    table = _new_table(title, ("engine", "pass"), _LIMITS)
    for row in found["limits"]:
        table.add_row(
            row["engine"],
            row["call"],
            f"{row['ms']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['operations'] / 1e6:.0f}",
            f"{row['stream_ms']:.2f}",
            f"{row['compute_ms']:.2f}",
            row["regime"] + (", in cache" if row["is_in_cache"] else ""),
        )
    return table


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


def _of(row: Record, found: Record, name: str) -> Any:
    """A replay's speed-ups are those of decoding: its prompts are not real."""
    return row[f"decode_{name}" if found["is_replay"] else name]


def _new_table(title: str, names: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _range(bounds: list[float]) -> str:
    return f"{bounds[0]:.2f}-{bounds[1]:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
