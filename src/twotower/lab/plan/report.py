"""A plan for readers: sentences, tables, pictures, and one HTML page with all of them."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.lab.plan.inputs import MODES
from twotower.lab.report import (
    COLORS,
    Record,
    Table,
    html_json,
    html_page,
    html_picture,
    html_table,
    new_axes,
    stack_bars,
    to_png,
    write_files,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAN_FILE = "plan.json"
CAPTIONS = {
    "speed": (
        "Speed by batch",
        "Tokens a second of all rows together, prompts included, with at most so many rows at a "
        "time. A line stays level where more rows do not fit or would only push experts out of "
        "the device: the others wait.",
    ),
    "break_even": (
        "Break-even",
        "How many times as fast as AR diffusion decodes, by the tokens that a denoiser pass "
        "commits, at the batch asked for, one group of rows.",
    ),
    "memory": (
        "Memory",
        "What each device holds at the end of the answers. Dense: all weights but the routed "
        "experts. Experts in host memory are not in the bars.",
    ),
    "passes": (
        "Where the time goes",
        "A part of a pass takes the longer of its streaming and its arithmetic; both count only "
        "where they rule. Overhead goes with the layers.",
    ),
}
_GIB, _MIB = 2**30, 2**20
MODE_COLUMNS = (
    "where",
    "tokens/s",
    "decoding",
    "a row",
    "first tokens, ms",
    "overlapped",
    "$ a million",
)
PASS_COLUMNS = ("ms", "overhead", "bandwidth", "arithmetic", "host link", "experts", "bound by")
# Of a plan, in the words that a reader needs to judge it; docs/plan.md says more.
ASSUMPTIONS = (
    "A pass streams each weight that it needs once; parts of a pass follow one another, each at "
    "the peak bandwidth or arithmetic times a fixed share; every layer adds a fixed time.",
    "n tokens choose E (1 - (1 - k/E)^n) distinct experts of E with k a token: independent "
    "tokens, even experts.",
    "All rows are equal: same lengths, same tokens per pass. Real batches wait for their slowest "
    "block.",
    "Weights of 8 and 4 bits are read as such and multiplied in the arithmetic of --compute.",
    "A tower stays whole on one device; experts in host memory cross the link in every pass that "
    "needs them, and nothing overlaps with that.",
    "Keys count half-way through the answer; activations are estimated from widths.",
)


_ASKED = ("model", "hardware", "devices", "widths", "compute", "efficiency", "workload")


def write_plan(record: Record, folder: Path) -> None:
    """plan.json, report.html and a PNG per picture."""
    pictures = {name: to_png(figure) for name, figure in plan_figures(record).items()}
    write_files(folder, PLAN_FILE, record, pictures, to_html(record, pictures))


def to_html(record: Record, pictures: Mapping[str, bytes]) -> str:
    """The whole page: headline, tables, pictures, assumptions, what was asked."""
    title = f"{record['model']['name']} on {record['devices']} x {record['hardware']['name']}"
    said = [f"<p class='headline'>{escape(line)}</p>" for line in headline(record)]
    parts = [f"<h1>{escape(title)}</h1>", *said, "<p>Predicted, not measured.</p>"]
    for table in tables(record):
        parts += [f"<h2>{escape(table.title)}</h2>", html_table(table)]
    parts += [html_picture(*CAPTIONS[name], data) for name, data in pictures.items()]
    assumed = "".join(f"<li>{escape(line)}</li>" for line in ASSUMPTIONS)
    parts += ["<h2>What is assumed</h2>", f"<ul>{assumed}</ul>"]
    parts += ["<h2>What was asked</h2>", html_json(record, _ASKED)]
    return html_page("Plan", parts)


def tables(record: Record) -> list[Table]:
    """The modes, and the passes where there are any."""
    modes = [[mode, *mode_row(found)] for mode, found in record["modes"].items()]
    found = [Table("modes", ("mode", *MODE_COLUMNS), modes)]
    if record["passes"]:
        passes = [[call, *pass_row(row)] for call, row in record["passes"].items()]
        found.append(Table("passes, ms", ("pass", *PASS_COLUMNS), passes))
    return found


def headline(record: Record) -> list[str]:
    """A sentence per finding: memory, each mode, the break-even, which is faster at which batch."""
    lines = memory_lines(record)
    lines += [_mode_sentence(mode, found) for mode, found in record["modes"].items()]
    if record["break_even"] is not None:
        lines.append(_even_sentence(record))
    whole, each = record["spans"]["all"], record["spans"]["per_device"]
    if whole:
        lines.append(f"Faster, by batch size (1, 2, 4, ...): {_spans(whole)}.")
    if each != whole:
        lines.append(f"Per device: {_spans(each)}.")
    return lines


def memory_lines(record: Record) -> list[str]:
    """What the towers and a row's cache take, and the usable memory of a device."""
    memory = record["memory"]
    towers = ", ".join(f"{tower} {_bytes(n)}" for tower, n in memory["tower_bytes"].items())
    lines = [
        f"Weights: {towers}. Cache per row: {_bytes(memory['cache_bytes_per_row'])}. Usable "
        f"memory: {record['devices']} x {_bytes(memory['usable_bytes_per_device'])}."
    ]
    if record["model"]["denoiser"] is None:
        lines.append("The denoiser is a second full tower; --denoiser takes a thin one.")
    return lines


def _bytes(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"


def _mode_sentence(mode: str, found: Record) -> str:
    if not found["fits"]:
        return f"{mode} does not fit: {found['missing']}."
    if "missing" in found:
        return f"{mode} fits ({found['device_map']['name']}); {found['missing']}."
    cost = found["dollars_per_million_tokens"]
    price = "" if cost is None else f", {cost:.2f} dollars a million tokens"
    return (
        f"{mode}: {found['tokens_per_s']:.1f} tokens/s{price}, on {found['device_map']['name']}"
        f"{_overlap(found)}."
    )


def _overlap(found: Record) -> str:
    """What two groups of rows that overlap give against one in sequence, where there may be two."""
    if found["decode_ms_overlapped"] is None:
        return ""
    gain = found["decode_ms_in_sequence"] / found["decode_ms_overlapped"]
    used = "used" if found["overlapped"] else "not used"
    return f"; two groups of rows overlapped decode at {gain:.2f} times one group's speed: {used}"


def _even_sentence(record: Record) -> str:
    even = record["break_even"]
    return (
        f"A denoiser pass takes {even['denoise_per_ar_step']:.2f} AR steps. "
        f"Diffusion {_reaches(even['tokens_per_nfe'], 'tokens/NFE (denoiser pass)')}; "
        f"speculation {_reaches(even['tokens_per_cycle'], 'tokens a cycle')}."
    )


def _reaches(needed: Mapping[str, float | None], unit: str) -> str:
    """From which value of its one quantity on a mode reaches each multiple of AR's speed."""
    if needed["1"] is None:  # and then no multiple of it
        return "is never as fast as AR"
    said = [f"as fast as AR from {needed['1']:.2f} {unit} on"]
    for target, value in list(needed.items())[1:]:
        start = "never" if value is None else f"from {value:.2f}"
        said.append(f"{target} times as fast {start}")
    return f"is {' and '.join(said)}"


def _spans(spans: list[Record]) -> str:
    """'ar 1 to 6, diffusion 7 to 61, ar from 62 on'."""
    *inner, last = spans
    shown = [f"{span['winner']} {span['first']} to {span['last']}" for span in inner]
    return ", ".join([*shown, f"{last['winner']} from {last['first']} on"])


def mode_row(found: Record) -> list[str]:
    """The cells of MODE_COLUMNS."""
    where = found["device_map"]["name"] if found["fits"] else "does not fit"
    if "missing" in found:
        return [where, *["-"] * (len(MODE_COLUMNS) - 1)]
    decode, cost = found["decode_tokens_per_s"], found["dollars_per_million_tokens"]
    return [
        where,
        f"{found['tokens_per_s']:.1f}",
        "-" if decode is None else f"{decode:.1f}",
        f"{found['tokens_per_s_of_a_row']:.1f}",
        f"{found['first_tokens_ms']:.0f}",
        "yes" if found["overlapped"] else "no",
        "-" if cost is None else f"{cost:.2f}",
    ]


def pass_row(found: Record) -> list[str]:
    """The cells of PASS_COLUMNS."""
    names = ("ms", "overhead_ms", "stream_ms", "compute_ms", "host_ms")
    return [
        *[f"{found[name]:.2f}" for name in names],
        f"{found['experts_per_layer']:.0f}",
        found["ruled_by"],
    ]


_FAR = 10  # times the fullest device
_KINDS = ("dense", "experts", "cache", "activations")


def plan_figures(record: Record) -> dict[str, "Figure"]:
    """Every picture that the record has data for, by the name of its file."""
    made = {
        "speed": plot_speed(record),
        "break_even": plot_break_even(record),
        "memory": plot_memory(record),
        "passes": plot_passes(record),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def plot_speed(record: Record) -> "Figure | None":
    """Tokens a second by rows at a time, a line per mode."""
    if not record["sweep"]:
        return None
    figure, axes = new_axes()
    for color, mode in zip(COLORS, MODES, strict=False):
        points = [(p["batch_size"], p["modes"][mode]) for p in record["sweep"]]
        kept = [(batch, found["tokens_per_s"]) for batch, found in points if found]
        if kept:
            axes.plot(*zip(*kept, strict=True), "o-", color=color, label=mode)
    axes.set_xscale("log", base=2)
    batches = [point["batch_size"] for point in record["sweep"]]
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_yscale("log")
    axes.axvline(record["workload"]["batch_size"], color="gray", linestyle="--", linewidth=1)
    axes.set_xlabel("rows at a time, at most; dashed: the batch asked for")
    axes.set_ylabel("tokens/s, prompts included")
    axes.set_title("Speed by batch")
    axes.legend()
    return figure


def plot_break_even(record: Record) -> "Figure | None":
    """Speed-up of diffusion over AR, decoding alone, against tokens per pass."""
    even, passes = record["break_even"], record["passes"]
    if even is None:
        return None
    work = record["workload"]
    reads = -(-work["new_tokens"] // work["block_size"]) - 1
    read_ms = even["read_ms"] * reads
    figure, axes = new_axes()
    ar_ms = passes["ar_step"]["ms"] * (work["new_tokens"] - 1)
    at = [1 + 0.25 * i for i in range(4 * (work["block_size"] - 1) + 1)]
    cost = [work["new_tokens"] / k * passes["denoise_pass"]["ms"] + read_ms for k in at]
    axes.plot(at, [ar_ms / ms for ms in cost], color=COLORS[1])
    for height, label in ((1.0, "AR"), (2.42, "2.42, the announcement")):
        axes.axhline(height, color="gray", linestyle="--", linewidth=1)
        axes.annotate(label, (at[-1], height), ha="right", va="bottom", fontsize=8, color="gray")
    if work["tokens_per_nfe"] is not None:
        axes.axvline(work["tokens_per_nfe"], color="gray", linestyle=":", linewidth=1)
    axes.set_xlabel("tokens per denoiser pass; dotted: assumed here")
    axes.set_ylabel("times the speed of AR")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Break-even at batch {work['batch_size']}")
    return figure


def plot_memory(record: Record) -> "Figure":
    """What each device holds in each mode, against its usable memory."""
    bars = []
    for mode, found in record["modes"].items():
        for number, device in enumerate(found["device_map"]["devices"]):
            towers = " + ".join(device["towers"])
            bars.append((f"{mode}, device {number}: {towers}", device))
    figure, axes = new_axes(1.6 + 0.45 * len(bars))
    most = max(device["total"] for _, device in bars)
    scale, unit = ("GiB", _GIB) if most >= _GIB else ("MiB", _MIB)
    usable = record["memory"]["usable_bytes_per_device"]
    parts = {kind: [device[kind] / unit for _, device in bars] for kind in _KINDS}
    names = [name for name, _ in bars]
    stack_bars(axes, names, parts, f"{scale}; usable per device: {usable / unit:,.0f}")
    if usable <= _FAR * most:  # else the line would leave no room for the bars
        axes.axvline(usable / unit, color="gray", linestyle="--", linewidth=1)
    axes.set_title("Memory")
    figure.legend(loc="outside lower center", ncols=len(_KINDS), fontsize=8)
    return figure


def plot_passes(record: Record) -> "Figure | None":
    """Milliseconds of each pass and what they go to."""
    passes = record["passes"]
    if not passes:
        return None
    figure, axes = new_axes(1.6 + 0.45 * len(passes))
    keys = {"overhead": "overhead_ms", "bandwidth": "stream_ms", "arithmetic": "compute_ms"}
    parts = {
        label: [found[key] for found in passes.values()]
        for label, key in {**keys, "host link": "host_ms"}.items()
    }
    stack_bars(axes, list(passes), parts, "ms a pass, all rows")
    axes.set_title("Where the time of a pass goes")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure
