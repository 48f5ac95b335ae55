"""Tables of docs/figures.md: a function for each kind of record, JSON to Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = Mapping[str, Any]
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
PASSES = ("ar_step", "denoise_pass", "extend", "verify")
_PASS_LENGTHS = ("2", "4", "8", "16")


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def between(ends: Sequence[float] | None, scale: float = 1, digits: int = 2) -> str:
    return "-" if ends is None else f"{scale * ends[0]:.{digits}f} to {scale * ends[1]:.{digits}f}"


# Quality ------------------------------------------------------------------------------------


def quality(record: Record) -> str:
    """A row per category: what the block modes keep of AR and what they gain."""
    head = ["category", "AR right"]
    if has_diffusion := "diffusion" in record["modes"]:
        head += ["diffusion right", "kept", "95 %", "tokens/NFE", "NFE", "x AR"]
    if has_speculation := "speculative" in record["modes"]:
        head += ["speculative = AR", "tokens/cycle", "NFE", "x AR"]
    rows = []
    for category, modes in {**record["categories"], "all": record["modes"]}.items():
        row = [category, share(modes["ar"])]
        if has_diffusion:
            row += diffusion_cells(modes["diffusion"])
        if has_speculation:
            row += speculative_cells(modes["speculative"])
        rows.append(row)
    return markdown(head, rows)


def share(found: Record) -> str:
    return f"{found['correct']}/{found['n']}"


def diffusion_cells(found: Record) -> list[str]:
    interval = between(found["retention_interval"], 100, 1)
    cells = [share(found), percent(found["retention"]), interval]
    return [
        *cells,
        number(found["tokens_per_nfe"]),
        str(found["nfe"]),
        number(found["speed_ratio"]),
    ]


def speculative_cells(found: Record) -> list[str]:
    same = f"{found['same_as_ar']}/{found['n']}"
    cycle = number(found["tokens_per_forward"])
    return [same, cycle, str(found["nfe"]), number(found["speed_ratio"])]


def quality_line(record: Record) -> str:
    """The result of all categories in two sentences."""
    ours, drafts = record["modes"]["diffusion"], record["modes"]["speculative"]
    return (
        f"Diffusion keeps {percent(ours['retention'])} of the AR accuracy "
        f"(95 %: {between(ours['retention_interval'], 100, 1)}) at "
        f"{number(ours['tokens_per_nfe'])} tokens/NFE.\nSpeculative texts equal AR's in "
        f"{drafts['same_as_ar']} of {drafts['n']} answers, "
        f"{number(drafts['tokens_per_forward'])} tokens a cycle."
    )


def quality_modes(record: Record) -> str:
    """A row per mode over all categories: the short form."""
    rows = []
    for mode, found in record["modes"].items():
        kept = f"{percent(found['retention'])} ({between(found['retention_interval'], 100, 1)})"
        per_pass = (number(found[name]) for name in ("tokens_per_nfe", "tokens_per_forward"))
        rows.append([mode, share(found), kept, *per_pass, number(found["speed_ratio"])])
    head = ["mode", "right", "kept of AR (95 %)", "tokens/NFE", "tokens/context pass", "x AR"]
    return markdown(head, rows)


# Speed --------------------------------------------------------------------------------------


def texts(record: Record) -> str:
    """Every engine and mode: time a token of the first size, tokens a second of all sizes."""
    sizes = record["sizes"]
    first = next(iter(sizes))
    head = ["engine", "mode", f"ms/token, {first}", "quartiles", "x AR, same engine", "x best AR"]
    rows = []
    for engine, modes in sizes[first]["engines"].items():
        for mode, found in modes.items():
            rates = [size["engines"].get(engine, {}).get(mode) for size in sizes.values()]
            rows.append(
                [
                    *(engine, mode, number(found["ms_per_token"])),
                    between(found["ms_per_token_quartiles"]),
                    number(found["speedup_vs_own_ar"]),
                    number(found["speedup_vs_best_ar"]),
                    *("-" if rate is None else f"{rate['tokens_per_s']:,.0f}" for rate in rates),
                ]
            )
    return markdown([*head, *(f"tokens/s, {size}" for size in sizes)], rows)


def bench_short(record: Record) -> str:
    """The shipped model alone, without what few readers look for."""
    engines = record["sizes"]["shipped"]["engines"]
    return markdown(
        ["engine", "mode", "ms/token", "quartiles", "x AR, same engine"],
        [
            [
                *(engine, mode, number(found["ms_per_token"])),
                between(found["ms_per_token_quartiles"]),
                number(found["speedup_vs_own_ar"]),
            ]
            for engine, modes in engines.items()
            for mode, found in modes.items()
        ],
    )


def passes(record: Record) -> str:
    """Milliseconds of each pass by size and engine, and from how many tokens a pass pays."""
    rows = []
    for size, found in record["sizes"].items():
        for engine, times in found["ms_by_engine"].items():
            cost = found["pays"][engine]["denoise_per_ar_step"]
            cells = (f"{times[name]['median']:.3g}" for name in PASSES)
            rows.append([size, engine, *cells, number(cost)])
    head = ["size", "engine", "AR step, ms", "pass of 16", "extension", "verification"]
    return markdown([*head, "pass / AR step"], rows)


def decode_only(record: Record) -> str:
    """Milliseconds a token without prefill, by size."""
    sizes = record["sizes"]
    first = next(iter(sizes.values()))["engines"]
    rows = [
        [engine, mode, *(number(size["engines"][engine][mode]["decode_ms_per_token"])
                         for size in sizes.values())]
        for engine, modes in first.items() for mode in modes
    ]  # fmt: skip
    return markdown(["engine", "mode", *(f"ms/token, {size}" for size in sizes)], rows)


def rows_table(record: Record) -> str:
    """Tokens a second by rows decoded at a time."""
    found = {(r["mode"], r["rows"]): r["tokens_per_s"]["median"] for r in record["results"]}
    counts = sorted({rows for _, rows in found})
    table = [
        [mode, *(f"{found[mode, rows]:,.0f}" for rows in counts)]
        for mode in dict.fromkeys(mode for mode, _ in found)
    ]
    return markdown(["tokens/s", *(f"{rows} row{'s' * (rows > 1)}" for rows in counts)], table)


def prefix_cache(record: Record) -> str:
    """Processor seconds of prefill, by what the cache knows."""
    measured = [row for row in record["rows"] if "shared" in row]
    rows = [
        [
            *(row["backend"], f"{row['shared']:,}"),
            *(number(row[f"{name}_s"], 3) for name in ("plain", "cold", "known")),
            f"{row['cache_bytes'] / 1e6:.1f} MB",
        ]
        for row in measured
    ]
    head = ["backend", "shared tokens", "without cache, s", "empty cache, s", "beginning known, s"]
    return markdown([*head, "contexts kept"], rows)


def grammar_costs(record: Record) -> str:
    """Microseconds of compiling a grammar and of each token's mask."""
    sizes = {name: part for name, part in record.items() if name.startswith("masks")}
    rows = []
    for grammar in next(iter(sizes.values())):
        cells = []
        for found in (part[grammar] for part in sizes.values()):
            marks = (f"{found[name]:,}" for name in ("median_us", "p99_us", "max_us"))
            cells.append(f"{found['compile_us']:,}; {', '.join(marks)}")
        rows.append([grammar, *cells])
    head = ["compile; a token's median, 99 %, maximum, in us"]
    table = markdown([*head, *(name.removeprefix("masks, ") for name in sizes)], rows)
    free, calls = record["speculative"]["free"], record["speculative"]["calls"]
    return (
        f"{table}\n\nTokens a context pass on tool calls: "
        f"{free['tokens_per_context_forward']} without a grammar, "
        f"{calls['tokens_per_context_forward']} with it."
    )


# Memory, precision --------------------------------------------------------------------------


def decode_memory(record: Record) -> str:
    """Growth of the resident peak over the loaded model, by prompt length and mode."""
    cases = {(case["prompt_tokens"], case["mode"]): case for case in record["cases"]}
    modes = list(dict.fromkeys(mode for _, mode in cases))
    rows = []
    for length in sorted({length for length, _ in cases}):
        one = cases[length, modes[0]]
        cache = (one["kv_bytes"] + one["state_bytes"]) / 1e6
        growth = (f"+{cases[length, mode]['growth_bytes'] / 1e6:.1f} MB" for mode in modes)
        rows.append([f"{length:,}", f"{cache:.1f} MB", *growth])
    return markdown(["prompt tokens", "cache", *modes], rows)


def precision_quality(record: Record) -> str:
    """Perplexity and agreement of a real model by precision."""
    rows = [
        [name.replace("none", "float32"), f"{p['perplexity']:.3f}", f"{100 * p['same_best']:.1f} %"]
        for name, p in record["precisions"].items()
    ]
    table = markdown(["precision", "perplexity", "best token as in float32"], rows)
    return f"{record['model']}, {record['tokens']:,} tokens of {record['texts']} texts.\n\n{table}"


def quantised_quality(record: Record) -> str:
    """Quality and file size by precision."""
    rows = [
        [
            one["setting"],
            f"{one['file_mb']} MB" if one.get("file_mb") else "-",
            *(one["ar"]["correct"], one["diffusion"]["correct"]),
            percent(one["diffusion"]["retention"]),
            between(one["diffusion"]["retention_interval"], 100, 1),
            number(one["diffusion"]["tokens_per_nfe"]),
        ]
        for one in record["settings"]
    ]
    head = ["setting", "file", "AR right", "diffusion right", "kept of AR, same setting", "95 %"]
    return markdown([*head, "tokens/NFE"], rows)


def contest(record: Record) -> str:
    """What a token costs each engine on a real model."""
    rows = [
        [
            *(r["engine"], r["quantization"], r["mode"]),
            *(number(r[ratio]) for ratio in ("decode_ms", "x_plain", "x_best")),
            f"{r['prompt_tokens_per_s']:,.0f}",
            *(number(r["tokens_per_pass"]), f"{r['same_as_plain']}/{r['n']}"),
        ]
        for r in record["contestants"]
    ]
    head = ["engine", "quantization", "mode", "ms a token", "x plain", "x best", "prompt tokens/s"]
    return markdown([*head, "tokens/pass", "texts as plain"], rows)


def contest_short(record: Record) -> str:
    """Our engine, and the fastest of the others, in the same quantisation."""
    every = record["contestants"]
    times = {f"{r['engine']} {r['quantization']} {r['mode']}": r["decode_ms"] for r in every}
    rows = [
        [
            *(r["quantization"], r["mode"], number(r["decode_ms"]), number(r["tokens_per_pass"])),
            *(f"{r['same_as_plain']}/{r['n']}", r["best"].replace(f" {r['quantization']}", "")),
            *(number(times[r["best"]]), number(r["x_best"])),
        ]
        for r in every
        if r["engine"] == "twotower" and r["quantization"] != "none"
    ]
    head = ["quantization", "mode", "ms a token", "tokens/context pass", "texts as AR"]
    return markdown([*head, "fastest of the others", "its ms", "speed over it"], rows)


def drafts(record: Record) -> str:
    """Tokens a cycle and speed by task and kind of draft."""
    rows = [
        [
            *(task, way, f"{found['equal']}/{found['prompts']}", number(found["tokens_per_cycle"])),
            *(number(found["x_ar"]), number(found["x_ar_median"]), found["nfe"], found["tokens"]),
        ]
        for task, ways in record["tasks"].items()
        for way, found in ways.items()
    ]
    head = ["prompts", "drafts", "texts as AR", "tokens a cycle", "x AR", "median x AR", "NFE"]
    return markdown([*head, "tokens"], rows)


def denoiser_parts(record: Record) -> str:
    """Tokens a cycle by variant, beside the first."""
    variants, draw = record["variants"], np.random.default_rng(0)
    first, rows = np.array(variants[0]["tokens_per_cycle"]), []
    for one in variants:
        gains = np.array(one["tokens_per_cycle"]) - first
        picks = draw.integers(len(gains), size=(10_000, len(gains)))
        low, high = np.quantile(gains[picks].mean(axis=1), [0.025, 0.975])
        change = f"{gains.mean():+.3f} ({low:+.3f} to {high:+.3f})" if gains.any() else ""
        cost = one["draft_ms"] / min(v["ar_step_ms"] for v in variants)
        rows.append(
            [
                *(one["variant"], one["processor_s"], number(one["loss"]), number(one["mean"])),
                *(change, f"{100 * one['right'][0]:.0f} %", number(cost)),
            ]
        )
    head = ["variant", "processor s", "loss", "tokens a cycle", "difference", "first right"]
    return markdown([*head, "draft, AR steps"], rows)


def pass_costs(record: Record) -> str:
    """What a pass over several tokens of each row costs, in AR steps of those rows."""
    rows = [
        [count, number(found["ar_ms"]), *(number(found["cost"][n]) for n in _PASS_LENGTHS)]
        for count, found in record["rows_measured"].items()
    ]
    return markdown(["rows", "AR step, ms", *(f"{n} tokens" for n in _PASS_LENGTHS)], rows)


def mapped_experts(record: Record) -> str:
    """What a memory limit does to experts in memory and in their files."""
    rows = []
    for run in record["runs"]:
        limit = {"data": "RLIMIT_DATA"}.get(run["limit"], run["limit"])
        outcome = "refused: does not fit" if "refused" in run else run.get("note", "")
        sizes = ("peak_rss_mb", "private_mb", "read_from_disk_mb")
        cells = [f"{run[name]:,} MB" if name in run else "-" for name in sizes]
        loaded, rate = (number(run.get(name)) for name in ("load_s", "tokens_per_s"))
        head = [limit, run["experts"], run["mode"]]
        rows.append([*head, loaded, *cells, rate, outcome])
    head = ["limit", "experts", "mode", "loading, s", "peak resident", "private", "read from disk"]
    return markdown([*head, "tokens/s", ""], rows)
